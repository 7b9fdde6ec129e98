from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from diffsparse.eval import cli, plan
from diffsparse.published_models import PUBLISHED


def test_the_command_says_what_wan_would_gain(capsys, tmp_path):
    output = tmp_path / "plan.json"
    command = "plan --family wan --size 1280x720 --frames 81 --steps 50 --gpu H200 --json"
    assert cli.main([*command.split(), str(output)]) == 0
    shown = capsys.readouterr().out
    assert "75,600: 21 x 45 x 80, 0 text" in shown
    assert "prediction, not a measurement" in shown
    written = json.loads(output.read_text())
    assert f"{written['speed_up']:.2f}x, without text encoder and VAE" in shown
    # The documentation shows this command, in shorter lines.
    documentation = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    assert " ".join(shown.split()) in " ".join(documentation.split())


def test_images_have_one_frame_where_nothing_is_said(capsys):
    assert cli.main(["plan", "--family", "flux", "--size", "1024x1024"]) == 0
    assert "4,608: 1 x 64 x 64, 512 text" in capsys.readouterr().out


def test_the_help_names_every_published_model():
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    help_text = parser.format_help()
    assert [name for name in PUBLISHED if name not in help_text] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "720p"], "--size must be WIDTHxHEIGHT such as 1280x720, got 720p."),
        (["--family", "sora"], "`--family` must be one of wan, wan-1.3b, "),
        (["--steps", "0"], "`--steps` must be at least 1, got 0"),
        (["--json", "/nowhere/plan.json"], "`--json` must name a file in a folder that exists, got /nowhere/plan.json"),
        (["--size", "1280x721"], "`height` of WanTransformer3DModel must be a positive multiple of 16 pixels, got 721"),
    ],
)
def test_what_the_user_can_mend_is_told_in_one_line(arguments, message, capsys):
    assert cli.main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err

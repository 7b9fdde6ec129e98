from __future__ import annotations

import json
import math

import numpy as np
import pytest
from commands import run_command

from diffsparse.eval import compare
from diffsparse.eval.comparison import WINDOW
from diffsparse.eval.lpips_metric import NoLpips
from diffsparse.eval.video_io import write_images, write_video

NONE = NoLpips("alex", "n/a: get it at this address")


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch):
    monkeypatch.setattr(compare, "lpips_or_reason", lambda net, backbone: NONE)


def noise(frames, seed=0, height=32, width=48):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def run(*argv):
    return run_command("eval", "compare", *argv)


def test_a_known_difference_has_its_known_psnr(tmp_path, capsys):
    a = np.full((WINDOW + 3, 16, 16, 3), 100, dtype=np.uint8)
    b = a.copy()
    b[5] += 20
    b[7] += 10
    write_images(tmp_path / "a", a)
    write_images(tmp_path / "b", b)
    assert run(tmp_path / "a", tmp_path / "b", "--json", tmp_path / "scores.json") == 0
    psnr = json.loads((tmp_path / "scores.json").read_text())["psnr_db"]
    worst, better = (20 * math.log10(255 / difference) for difference in (20, 10))
    assert psnr["per_frame"] == ["infinite"] * 5 + [
        pytest.approx(worst),
        "infinite",
        pytest.approx(better),
    ] + ["infinite"] * (WINDOW - 5)
    assert psnr["mean"] == pytest.approx((worst + better) / 2)
    assert (psnr["worst"], psnr["worst_frame"]) == (pytest.approx(worst), 5)
    shown = capsys.readouterr().out
    assert f"{worst:.2f} (frame 5)" in shown
    assert f"{WINDOW + 1} of {WINDOW + 3} frames are exactly equal" in shown


def test_equal_videos_are_shown_as_equal(tmp_path, capsys):
    write_video(tmp_path / "a.mp4", noise(3), fps=8)
    assert run(tmp_path / "a.mp4", tmp_path / "a.mp4", "--json", tmp_path / "scores.json") == 0
    assert "infinite (equal)" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["psnr_db"]["mean"] == "infinite"
    assert scores["ssim"]["mean"] == pytest.approx(1, abs=1e-6)


def test_missing_lpips_is_shown_with_the_way_to_get_it(tmp_path, capsys):
    write_images(tmp_path / "a", noise(1))
    run(tmp_path / "a", tmp_path / "a", "--json", tmp_path / "scores.json")
    assert "n/a: get it at this address" in capsys.readouterr().out
    assert json.loads((tmp_path / "scores.json").read_text())["lpips"].startswith("n/a")


def test_a_json_that_cannot_be_written_is_found_before_the_work(tmp_path):
    with pytest.raises(ValueError, match="--json"):
        run("no-video.mp4", "no-video.mp4", "--json", tmp_path / "no" / "scores.json")


def test_two_runs_are_compared_video_by_video(fake_run, tmp_path, capsys):
    a = fake_run(["cat", "dog"], error=lambda *of: 0.2, name="a")
    b = fake_run(["cat", "dog"], error=lambda *of: 0.1, name="b")
    assert run(a, b, "--json", tmp_path / "runs.json") == 0
    psnr = json.loads((tmp_path / "runs.json").read_text())["differences"][0]
    assert (psnr["metric"], psnr["num_pairs"]) == ("psnr_db", 2)
    # Half the error.
    assert psnr["mean"] == pytest.approx(20 * math.log10(2), abs=0.1)
    shown = capsys.readouterr().out
    assert "n/a: get it at this address" in shown
    assert f"A is {a}, B is {b}" in shown


def test_a_run_against_a_video_is_an_error_with_a_way_out(fake_run, tmp_path):
    of_run = fake_run(["cat"])
    for pair in ((of_run, tmp_path / "b.mp4"), (tmp_path / "b.mp4", of_run)):
        with pytest.raises(ValueError, match=rf"{of_run} is a run, .*b\.mp4 is not: name two runs"):
            run(*pair)

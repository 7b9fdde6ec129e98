from __future__ import annotations

import json

import pytest

from diffsparse.eval import ablation, cli


@pytest.fixture(autouse=True)
def two_rules(monkeypatch):
    monkeypatch.setattr(ablation, "RULES", {name: ablation.RULES[name] for name in ("random blocks", "adaptive")})


def run(model, output, *more):
    command = ["eval", "ablation", "--model", str(model), "--device", "cpu", "--output", str(output)]
    return cli.main([*command, "--prompts", "1", "--densities", "0.5", "--steps", "2", *more])


def test_every_rule_is_measured_with_and_without_tail_and_never_twice(tiny_model, tmp_path, capsys, monkeypatch):
    file = tmp_path / "results.json"
    assert run(tiny_model, file) == 0
    found = json.loads(file.read_text())["psnr_db"]
    assert len(found) == 4
    table = capsys.readouterr().out
    assert "| random blocks | " in table
    assert "| adaptive | " in table
    monkeypatch.setattr(ablation, "generate", lambda *args: pytest.fail("measured again"))
    assert run(tiny_model, file) == 0
    assert json.loads(file.read_text())["psnr_db"] == found


def test_an_interrupted_run_goes_on_where_it_was(tiny_model, tmp_path, monkeypatch):
    file, real, calls = tmp_path / "results.json", ablation.generate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(ablation, "generate", interrupted)
    assert run(tiny_model, file) == cli.INTERRUPTED
    assert len(json.loads(file.read_text())["psnr_db"]) == 2
    assert run(tiny_model, file) == 0
    assert len(calls) == 4 + 1 + 2  # the dense video once more, and the two that were missing
    assert len(json.loads(file.read_text())["psnr_db"]) == 4


def test_results_of_other_settings_are_not_mixed(tiny_model, tmp_path, capsys):
    file = tmp_path / "results.json"
    assert run(tiny_model, file) == 0
    assert run(tiny_model, file, "--steps", "3") == cli.USER_ERROR
    assert "holds results of other settings" in capsys.readouterr().err

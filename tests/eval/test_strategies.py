from __future__ import annotations

import json

import pytest

import diffsparse
from diffsparse.eval import cli, recorded_calls, sweep
from diffsparse.eval.named_config import exported_strategies
from diffsparse.eval.strategy_rows import ROWS, WINDOWS
from diffsparse.eval.sweep_results import Pair, Score, SweepResults, Variant

COMMAND = ["eval", "strategies", "--device", "cpu", "--steps", "2", "--prompts", "2", "--densities", "0.3", "0.6"]


@pytest.fixture
def run(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *words: cli.main([*COMMAND, "--model", str(tiny_model), "--strategies", "Adaptive", "SVG2", *words])


def test_every_strategy_that_diffsparse_exports_is_a_row():
    rows = {type(row.strategy) for row in ROWS}
    assert rows == set(exported_strategies().values()) - {diffsparse.Dense}
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_position_of_a_dial_is_a_strategy_in_blocks_of_64(row):
    for position in (0.005, 0.1, 0.37, 1.0):
        options = vars(row.at(position))
        sizes = {options[name] for name in ("block_size", "query_block_size", "key_block_size") if name in options}
        assert sizes == {64}


def test_windows_grow():
    volumes = [frames * height * width for frames, height, width in WINDOWS]
    assert volumes == sorted(volumes)
    assert len(set(WINDOWS)) == len(WINDOWS)


def test_dials_then_shards_then_one_table(run, tmp_path, capsys, monkeypatch):
    assert run("--find-dials") == 0
    assert not list(tmp_path.glob("strategies-?-of-?.json"))
    # Not found again.
    monkeypatch.setattr(recorded_calls, "generate", lambda *args: pytest.fail("found again"))
    for shard in ("1/2", "2/2"):
        assert run("--shard", shard) == 0
    capsys.readouterr()
    files = sorted(tmp_path.glob("strategies-?-of-2.json"))
    assert cli.main(["eval", "strategies", "--merge", *map(str, files)]) == 0
    table = capsys.readouterr().out
    assert "### 30 %" in table
    assert "### 60 %" in table
    assert table.count("| SVG2 + tail") == table.count("| **Adaptive + tail") == 2
    assert "Videos a row: 2, of prompts: 2" in table
    assert sum(len(json.loads(file.read_text())["videos"]) for file in files) == 2 * 2 * 2 * 2
    assert "time of dense" not in table
    assert cli.main(["eval", "strategies", "--seconds", "--merge", *map(str, files)]) == 0
    assert capsys.readouterr().out.count("| time of dense |") == 2


def test_rows_with_the_tail_alone_are_compared_too(run, tmp_path, capsys):
    assert run("--tail", "with", "--output", "results.json") == 0
    videos = json.loads((tmp_path / "results.json").read_text())["videos"]
    assert {video["tail"] for video in videos} == {True}
    assert len(videos) == 2 * 2 * 2
    assert "| SVG2 + tail" in capsys.readouterr().out


def test_a_shard_does_not_find_dials(run, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "generate", lambda *args: pytest.fail("made a video"))
    assert run("--shard", "1/2") == cli.USER_ERROR
    assert "has no dials of Adaptive, SVG2. Find them before the shards" in capsys.readouterr().err


def test_a_plot_that_cannot_be_written_is_found_before_the_work(run, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "load_pipeline", lambda *args: pytest.fail("loaded"))
    assert run("--plot", "/nowhere/plot.png") == 2
    assert "--plot must name a file in a folder that exists, got /nowhere/plot.png" in capsys.readouterr().err


def test_dials_that_cannot_be_written_are_not_looked_for(run, monkeypatch, capsys):
    monkeypatch.setattr(recorded_calls, "generate", lambda *args: pytest.fail("worked for nothing"))
    assert run("--find-dials", "--dials", "nowhere/dials.json") == cli.USER_ERROR
    assert "--dials must name a file in a folder that exists" in capsys.readouterr().err


def test_results_of_another_command_are_refused(tmp_path, capsys):
    ablation = SweepResults({"sampling": "20 steps", "dense_steps": 0.2, "device": "cpu"})
    ablation.scores[Pair("a cat", 0), Variant("adaptive", 0.5, True)] = Score(20.0, 0.9, 0.5, 1.0, 2.0)
    ablation.write(tmp_path / "ablation.json")
    assert cli.main(["eval", "strategies", "--merge", str(tmp_path / "ablation.json")]) == cli.USER_ERROR
    assert "--merge: these are results of another command" in capsys.readouterr().err


@pytest.mark.parametrize("dials", [3, {}, {"Adaptive": {"0.5": {"option": "density", "value": "0.5"}}}])
def test_results_with_damaged_dials_are_refused(tmp_path, capsys, dials):
    results = SweepResults({"sampling": "20 steps", "dense_steps": 0.2, "device": "cpu", "dials": dials})
    results.scores[Pair("a cat", 0), Variant("Adaptive", 0.5, True)] = Score(20.0, 0.9, 0.5, 1.0, 2.0)
    results.write(tmp_path / "s.json")
    assert cli.main(["eval", "strategies", "--merge", str(tmp_path / "s.json")]) == cli.USER_ERROR
    assert "s.json: no table can be made of it (TypeError: dials" in capsys.readouterr().err


def test_an_unknown_strategy_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main([*COMMAND, "--strategies", "Adaptiv"])
    assert "invalid choice: 'Adaptiv'" in capsys.readouterr().err

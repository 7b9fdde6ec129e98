from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from commands import parsed

from diffsparse.eval import bench, random_attention, timing
from diffsparse.kernels import block_sparse_eager, self_test


def parse(*arguments):
    return parsed("bench", *arguments)


SMALL = ("--tokens", "300", "--heads", "1", "--head-dim", "8", "--blocks", "64x32", "--repeats", "1")


def test_every_case_is_measured_and_written(tmp_path, capsys):
    output = tmp_path / "speed.json"
    words = ("--blocks", "128x128", "--densities", "0.5", "--dtypes", "float32", "bfloat16", "--output", str(output))
    arguments = parse(*SMALL, *words)
    assert bench.run(arguments) == 0
    written = json.loads(output.read_text())
    assert written["machine"]["torch"] == torch.__version__
    errors = written["self_test_errors"]
    assert errors["eager float32"] < 1e-5 < errors["eager bfloat16"] < 1e-2
    measured = [(row["case"]["dtype"], row["case"]["ragged"], row["case"]["tail"]) for row in written["attention"]]
    assert sorted(measured) == [
        (dtype, ragged, tail)
        for dtype in ("bfloat16", "float32")
        for ragged, tail in [(False, False), (False, True), (True, False)]
    ]
    for row in written["attention"]:
        assert row["dense_seconds"] > 0
        # One pair of calls, so the speed-up is the ratio of the medians.
        assert row["speed_up"] == pytest.approx(row["dense_seconds"] / row["sparse_seconds"])
        assert row["share_of_linear"] == pytest.approx(row["speed_up"] * row["executed_density"])
    printed = capsys.readouterr().out
    assert "ragged" in printed
    assert "bfloat16 by eager, float32 by eager" in printed
    # Nothing is cut off in 80 columns.
    assert "…" not in printed


def test_the_lists_of_a_ragged_case_are_ragged(monkeypatch):
    counts = []

    def random_lists(*args, **options):
        lists = make(*args, **options)
        counts.append(lists[1].unique().numel())
        return lists

    make = random_attention.random_lists
    monkeypatch.setattr(random_attention, "random_lists", random_lists)
    cases = bench.make_cases(parse(*SMALL, "--tokens", "1024", "--densities", "0.5", "--dtypes", "float32"))
    for case in cases:
        bench.bench_attention(case, 1, torch.device("cpu"), "eager")
    assert [count > 1 for count in counts] == [case.ragged for case in cases] == [False, True, False]


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cpu", [("short", 3), ("long", 1)]), ("cuda", [("short", 15), ("short", 3), ("long", 1), ("long", 1)])],
)
def test_calls_take_turns_and_short_ones_are_repeated(monkeypatch, device, expected):
    made = []

    def seconds_of(call, device, repeats=1):
        made.append((call(), repeats))
        return {"short": timing.SHORTEST_TURN / 3, "long": 1.0}[call()]

    monkeypatch.setattr(timing, "seconds_of", seconds_of)
    seconds = timing.seconds_in_rounds({"short": lambda: "short", "long": lambda: "long"}, 2, torch.device(device))
    assert made[4:] == expected * 2
    assert {name: len(each) for name, each in seconds.items()} == {"short": 2, "long": 2}


def test_a_wrong_kernel_is_not_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(self_test, "self_test", lambda *args: float("nan"))
    output = tmp_path / "speed.json"
    assert bench.run(parse(*SMALL, "--output", str(output))) == 1
    assert "speed was not measured" in capsys.readouterr().out
    assert not output.exists()


def test_each_dtype_is_measured_and_tested_in_the_backend_that_takes_it(tmp_path, only_backends):
    """As on Hopper, where the fastest backend takes no float32."""

    def takes_halves(query, *sizes):
        return None if query.dtype == torch.bfloat16 else "it takes bfloat16"

    attend = block_sparse_eager.attend
    only_backends(halves=(takes_halves, attend), eager=(lambda *arguments: None, attend))
    output = tmp_path / "speed.json"
    assert bench.run(parse(*SMALL, "--densities", "0.5", "--output", str(output))) == 0
    written = json.loads(output.read_text())
    assert {(row["case"]["dtype"], row["backend"]) for row in written["attention"]} == {
        ("float32", "eager"),
        ("bfloat16", "halves"),
    }
    assert set(written["self_test_errors"]) == {"eager float32", "halves bfloat16"}


def test_threads_are_left_as_they_were(tmp_path):
    before = torch.get_num_threads()
    bench.run(parse(*SMALL, "--threads", "1", "--output", str(tmp_path / "speed.json")))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "0"), "`--tokens` must be at least 1, got 0"),
        (("--head-dim", "-8"), "`--head-dim` must be at least 1, got -8"),
        (("--head-dim", "257"), "`--head-dim` must be at most 256, got 257"),
        (("--threads", "0"), "`--threads` must be at least 1, got 0"),
        (("--device", "tpu"), "There is no device 'tpu' here, only cpu"),
        (("--densities", "25"), "`--densities` must be above 0 and at most 1, got 25.0. For 25 % say 0.25"),
        (("--blocks", "128"), "`--blocks` must be query x key block size in tokens, got '128'"),
        (("--output", "/nowhere/speed.json"), "`--output` must name a file in a folder that exists"),
        (("--output", "/"), "`--output` must name a file in a folder that exists"),
        (("--table", "/nowhere/speed.json"), "`--table` /nowhere/speed.json holds no results of a suite"),
        (("--suite", "tiny", "--densities", "0.5", "0.1"), "`--densities` 0.5 0.1 is of one size, and `--suite` tiny"),
        (("--suite", "tiny", "--head-dim", "128"), "`--head-dim` 128 is of one size, and `--suite` tiny"),
        (("--table", "speed.json", "--tokens", "4096"), r"`--tokens` 4096 is of one size, and `--table` speed\.json"),
    ],
)
def test_bad_arguments_are_an_error_that_names_them(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench.run(parse(*arguments))


PUBLISHED = Path(__file__).parents[2] / "docs/benchmarks/h200.json"
NO_ATTENTION = json.dumps(json.loads(PUBLISHED.read_text(encoding="utf-8")) | {"attention": []})


@pytest.mark.parametrize("contents", ["", "[]", "{}", '{"machine": 3}', NO_ATTENTION])
def test_a_table_of_no_results_is_an_error_that_names_the_file(tmp_path, contents):
    file = tmp_path / "speed.json"
    file.write_text(contents)
    with pytest.raises(ValueError, match=r"`--table` .*speed\.json holds no results of a suite"):
        bench.run(parse("--table", str(file)))


def test_who_stops_reading_the_table_does_not_make_it_a_damaged_file(monkeypatch):
    monkeypatch.setattr(bench, "print", Mock(side_effect=BrokenPipeError), raising=False)
    with pytest.raises(BrokenPipeError):
        bench.run(parse("--table", str(PUBLISHED)))

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from diffsparse.eval.paired_statistics import bootstrap_interval, sign_test
from diffsparse.eval.strategies_table import as_markdown, table_rows
from diffsparse.eval.sweep_results import Pair, Score, SweepResults, Variant


def results_of(psnr_db, densities=None):
    """Results at 20 % from PSNR by row and tail, video by video; the measured density is 0.2 but where said."""
    dial = {"option": "density", "value": "0.123456", "position": 0.1, "density": 0.2, "error": 0.4}
    dials = {row: {"0.2": dial | {"error_with_tail": 0.3}} for row, _ in psnr_db}
    results = SweepResults({"sampling": "20 steps", "dense_steps": 0.2, "device": "cpu", "dials": dials})
    for (row, tail), values in psnr_db.items():
        for number, value in enumerate(values):
            density = (densities or {}).get(row, 0.2)
            results.scores[Pair(f"prompt {number}", 0), Variant(row, 0.2, tail)] = Score(value, 0.9, density, 1.0, 2.0)
    return results


ADAPTIVE = {("Adaptive", True): [30.0, 28.0, 33.0], ("Adaptive", False): [29.0, 29.0, 30.0]}


def test_rows_go_by_psnr_and_differ_pair_by_pair():
    results = results_of(ADAPTIVE | {("other", False): [31.0, 28.5, 30.5]})
    rows = table_rows(results)
    assert [row.label for row in rows] == ["Adaptive + tail", "other", "Adaptive"]
    assert [row.differences for row in rows] == [None, [1.0, 0.5, -2.5], [-1.0, 1.0, -3.0]]
    low, high = bootstrap_interval([1.0, 0.5, -2.5])
    line = next(line for line in as_markdown(results).splitlines() if line.startswith("| other"))
    assert line == (
        f"| other | 20.0 % | 30.00 | -0.33 [{low:+.2f}, {high:+.2f}] | 2, 1; {sign_test([1, 1, -1]):.3f} "
        f"| 0.900 | 0.400 | `density=0.1235` |"
    )


def test_lpips_and_time_have_columns_of_their_own_where_they_are_known():
    results = results_of(ADAPTIVE)
    assert "LPIPS" not in as_markdown(results)
    assert "time" not in as_markdown(results)
    results.settings["lpips_net"] = "squeeze"
    for (pair, variant), score in results.scores.items():
        lpips = 0.25 if variant.tail else {"prompt 0": 0.1, "prompt 1": 0.3}.get(pair.prompt)
        results.scores[pair, variant] = dataclasses.replace(score, lpips=lpips, seconds=float(pair.prompt[-1]))
    table = [line.split(" | ") for line in as_markdown(results, has_time=True).splitlines() if line.startswith("| ")]
    heading, with_tail, without_tail = table
    assert heading[5:9] == ["SSIM", "LPIPS, squeeze", "time of dense", "error of attention"]
    assert with_tail[6:8] == ["0.250", "50 %"]
    # Of one video LPIPS is not known.
    assert without_tail[6:8] == ["–", "50 %"]


def test_a_row_at_another_density_is_marked_and_stands_last():
    results = results_of(
        ADAPTIVE | {("near", False): [20.0] * 3, ("far", False): [40.0] * 3}, {"near": 0.228, "far": 0.24}
    )
    assert [row.label for row in table_rows(results)][-2:] == ["near", "far *"]
    assert "the nearest that this dial reaches" in as_markdown(results)
    assert "\\*" not in as_markdown(results_of(ADAPTIVE))


def test_the_error_is_that_with_the_tail_where_there_is_one():
    assert {row.variant.tail: row.error for row in table_rows(results_of(ADAPTIVE))} == {True: 0.3, False: 0.4}


def test_a_video_that_equals_the_dense_one_has_no_difference():
    results = results_of(ADAPTIVE | {("all", False): [math.inf, 30.0, 30.0], ("same", False): [math.inf] * 3})
    rows = {row.variant.row: row for row in table_rows(results)}
    assert rows["all"].differences == [2.0, -3.0]
    assert rows["same"].differences == []
    assert "| same | 20.0 % | equal | – | – |" in as_markdown(results)


@pytest.mark.parametrize("left_out", [[("Adaptive", True)], list(ADAPTIVE)])
def test_without_the_default_there_is_nothing_to_differ_from(left_out):
    psnr_db = {key: value for key, value in ADAPTIVE.items() if key not in left_out} | {("other", True): [30.0] * 3}
    assert "| other + tail | 20.0 % | 30.00 | – | – |" in as_markdown(results_of(psnr_db))


def test_one_video_has_no_interval():
    assert "| 25.00 | -5.00 | 0, 1; 1.000 |" in as_markdown(
        results_of({("Adaptive", True): [30.0], ("x", True): [25.0]})
    )


def test_sparse_calls_that_never_ran_count_as_dense():
    results = results_of(ADAPTIVE | {("never", False): [math.inf] * 3}, {"never": None})
    assert {row.variant.row: row.density for row in table_rows(results)}["never"] == 1.0


def test_the_page_of_all_strategies_has_the_published_table():
    docs = Path(__file__).parents[2] / "docs"
    table = as_markdown(SweepResults.read(docs / "benchmarks/strategies.json"))
    assert table in (docs / "strategy-tables.md").read_text(encoding="utf-8")

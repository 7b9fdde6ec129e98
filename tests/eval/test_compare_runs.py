from __future__ import annotations

import json

import numpy as np
import pytest

from diffsparse.eval.compare_runs import compare_runs, rows_of_runs
from diffsparse.eval.lpips_metric import NoLpips
from diffsparse.eval.metrics import psnr_db
from diffsparse.eval.run_folder import Pair, RunFolder
from diffsparse.eval.video_io import read_frames

NONE = NoLpips("alex", "n/a: none")


def psnr_of_video(run, prompt):
    folder = RunFolder(run)
    dense, sparse = (np.stack(list(read_frames(folder.frames(name, Pair(prompt, 0))))) for name in ("dense", "fast"))
    return np.mean(psnr_db(dense, sparse))


def test_differences_are_of_the_same_prompts_whatever_their_order(fake_run):
    a = fake_run(["cat", "dog", "owl"], error=lambda config, prompt, seed: 0.1 + prompt / 20, name="a")
    b = fake_run(["owl", "cat"], error=lambda *of: 0.1, name="b")
    row = next(row for row in compare_runs(a, b, NONE) if row["metric"] == "psnr_db")
    cat, owl = psnr_of_video(b, 1) - psnr_of_video(a, 0), psnr_of_video(b, 0) - psnr_of_video(a, 2)
    assert row["num_pairs"] == 2
    assert row["mean"] == pytest.approx((cat + owl) / 2)
    assert row["mean_b"] - row["mean_a"] == pytest.approx(row["mean"])
    assert row["interval"][0] <= row["mean"] <= row["interval"][1]


def test_rows_say_which_run_is_better(fake_run):
    a = fake_run(["cat"], error=lambda *of: 0.2, name="a")
    b = fake_run(["cat"], error=lambda *of: 0.1, name="b")
    headings, rows = rows_of_runs(compare_runs(a, b, NONE), "alex")
    assert all(len(row) == len(headings) for row in rows)
    better = {row[1]: row[5] for row in rows}
    assert better == {"PSNR, dB": "B", "SSIM": "B", "flicker": "B", "speed-up": "neither"}


def test_configs_are_matched_by_name_or_being_the_only_ones(fake_run):
    a = fake_run(["cat"], ["fast", "slow"], name="a")
    b = fake_run(["cat"], ["slow", "other"], name="b")
    only = fake_run(["cat"], ["mine"], name="only")
    yours = fake_run(["cat"], ["yours"], name="yours")
    assert {row["config"] for row in compare_runs(a, b, NONE)} == {"slow"}
    assert {row["config"] for row in compare_runs(only, yours, NONE)} == {"mine, yours"}
    with pytest.raises(ValueError, match="no config in common: fast, slow against mine"):
        compare_runs(a, only, NONE)


def test_runs_without_a_video_in_common_are_an_error(fake_run):
    a, b = fake_run(["cat"], name="a"), fake_run(["dog"], name="b")
    with pytest.raises(ValueError, match="no scored video of the same prompt and seed in common"):
        compare_runs(a, b, NONE)


def test_where_none_is_in_common_since_one_is_damaged_the_file_is_named(fake_run):
    a, b = fake_run(["cat"], name="a"), fake_run(["cat"], name="b")
    file = b / "fast" / "000-seed0.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"process": None}))
    with pytest.raises(ValueError, match=f"in common .the first that {b} lacks: {file} is damaged .*Make some"):
        compare_runs(a, b, NONE)

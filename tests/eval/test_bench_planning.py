from __future__ import annotations

import pytest
import torch

from diffsparse.eval.bench_planning import Overhead, bench_planning, grid_of


def test_a_plan_is_paid_over_the_steps_that_it_serves():
    overhead = Overhead(dense_seconds=1.0, plan_seconds=0.2, permute_seconds=0.01, replan_every=4)
    assert overhead.share_of_dense == pytest.approx(0.06)


@pytest.mark.parametrize("tokens", [1, 30, 700])
def test_any_number_of_tokens_is_measured(tokens):
    overhead = bench_planning(grid_of(tokens), 2, 16, "float32", 0.5, 1, torch.device("cpu"))
    assert min(overhead.dense_seconds, overhead.plan_seconds, overhead.permute_seconds) > 0

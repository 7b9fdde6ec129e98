from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from diffsparse.comfy import summary
from diffsparse.comfy.models import MODELS
from diffsparse.comfy.summary import RunClock, summarize
from diffsparse.config import SparseAttentionConfig
from diffsparse.session import Session

FAMILY = MODELS[0]


def clock_of(monkeypatch, seconds, steps, total, sparse_from=1):
    """The clock of a run of the model at each of `steps`, read at these seconds."""
    seconds = iter(seconds)
    monkeypatch.setattr(summary.time, "perf_counter", lambda: next(seconds))
    clock = RunClock()
    for step in steps:
        clock.tick(step, total)
        clock.mark_run(sparse=step >= sparse_from)
    clock.stop()
    return clock


def test_a_line_has_steps_and_seconds(monkeypatch):
    clock = clock_of(monkeypatch, [0.0, 2.0, 2.0, 3.0, 3.0, 4.5], range(3), 4)
    steps = "2 of 3 steps sparse; 1.25 s a sparse step, 2.00 s a dense step"
    assert summarize(clock, [], finished=True) == f"DiffSparse: {steps}"
    assert summarize(clock, [], finished=False) == f"DiffSparse: stopped in step 3 of 4: {steps}"


def test_calls_and_reasons_are_summed_over_the_layers():
    first, second = (Session("Toy", FAMILY, ("a", "b"), SparseAttentionConfig()) for _ in range(2))
    for session in (first, second):
        session.tallies[0].sparse_calls = 3
        session.tallies[0].density = 3 * torch.tensor([0.2, 0.4])
    first.tallies[1].dense_reasons["early step"] = 5
    second.tallies[1].dense_reasons |= {"early step": 1, "attention mask": 1}
    assert summarize(RunClock(), [first, second], finished=True).split("; ")[1:] == [
        "density 30 % in 6 attention calls",
        "dense in 7: early step (6), attention mask (1)",
    ]


def test_sparse_steps_that_are_slower_are_said_so(monkeypatch):
    clock = clock_of(monkeypatch, [0.0, 1.0, 1.0, 9.0, 9.0, 10.5], range(3), 3)
    slower = "(at their fastest, sparse steps are slower here: raise min_tokens)"
    assert clock.describe(finished=True).endswith(f"1.00 s a dense step {slower}")


def test_a_hint_does_not_gainsay_the_seconds_before_it(monkeypatch):
    # The first dense step also loads the model.
    clock = clock_of(monkeypatch, [0.0, 5.0, 5.0, 6.0, 6.0, 7.5, 7.5, 9.0], range(4), 4, sparse_from=2)
    assert "1.50 s a sparse step, 3.00 s a dense step (at their fastest, sparse" in clock.describe(finished=True)


@pytest.mark.parametrize(("seconds", "is_slow"), [(1.5, False), (2.5, True)])
def test_steps_of_more_calls_are_judged_by_one_call(monkeypatch, seconds, is_slow):
    # As Heun's: the second call of a step is of the sigma that the next one begins with.
    ends = [0.0, 1.0, 1.0, 1.0 + seconds, 1.0 + seconds, 1.0 + 2 * seconds]
    clock = clock_of(monkeypatch, ends, (0, 1, 1, 2, 2), 3)
    assert ("sparse steps are slower" in clock.describe(finished=True)) is is_slow


def test_the_only_sparse_step_is_not_called_slow(monkeypatch):
    clock = clock_of(monkeypatch, [0.0, 1.0, 1.0, 9.0], range(2), 2)
    assert clock.describe(finished=True) == "1 of 2 steps sparse; 8.00 s a sparse step, 1.00 s a dense step"


def test_a_step_of_two_calls_is_one_step(monkeypatch):
    seconds = iter([0.0, 2.0])
    monkeypatch.setattr(summary.time, "perf_counter", lambda: next(seconds))
    clock = RunClock()
    for sparse in (True, False):
        clock.tick(0, 1)
        clock.mark_run(sparse)
    clock.stop()
    assert clock.describe(finished=True) == "1 of 1 steps sparse; 2.00 s a sparse step"


def test_a_run_of_no_call_has_a_line():
    assert RunClock().describe(finished=False) == "no call of the model came to this node"
    assert RunClock().describe(finished=True).startswith("no call of the model came to this node: there was no step")


def test_two_threads_may_begin_a_step_at_once(monkeypatch):
    clock = RunClock()
    clock.tick(0, 2)
    clock.mark_run(True)

    def later():
        time.sleep(0.02)
        return 0.0

    monkeypatch.setattr(summary.time, "perf_counter", later)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(clock.tick, (1, 1), (2, 2)))
    clock.mark_run(True)
    clock.stop()
    assert clock.describe(True).startswith("2 of 2 steps sparse")

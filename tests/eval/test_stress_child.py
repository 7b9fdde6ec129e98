from __future__ import annotations

import json
import time

import pytest
import stress_standins
import torch

from diffsparse.eval import stress_child
from diffsparse.eval.stress_child import repeat


def batches(calls, seconds=0.05):
    return [line for line in repeat(calls, seconds) if "calls" in line]


@pytest.fixture(autouse=True)
def _short_batches(monkeypatch):
    monkeypatch.setattr(stress_child, "SHORTEST_BATCH", 0.01)


def test_calls_take_turns_and_each_batch_is_said_before_and_after():
    calls = stress_standins.right({}) + stress_standins.always_off({})
    calls[0].name = "other"
    lines = list(repeat(calls, 0.05))
    assert len(lines) >= 8
    assert [line.get("begins", line.get("call")) for line in lines[:8]] == ["other"] * 2 + ["stand-in"] * 2 + (
        ["other"] * 2 + ["stand-in"] * 2
    )
    assert all("begins" in line for line in lines[::2])
    assert all("calls" in line for line in lines[1::2])


def test_short_batches_grow():
    sizes = [batch["calls"] for batch in batches(stress_standins.right({}))]
    assert sizes[:4] == [1, 1, 2, 4]


def test_the_first_turn_does_not_count():
    calls = stress_standins.right({})
    error = calls[0].error
    calls[0].error = lambda results: time.sleep(0.2) or error(results)
    assert len(batches(calls, seconds=0.05)) > 1


@pytest.mark.parametrize(("standin", "differing"), [("wrong_on_third_call", 2), ("unwritten_on_third_call", 4)])
def test_a_result_that_differs_once_is_found(standin, differing):
    done = batches(getattr(stress_standins, standin)({}))
    assert sum(batch["wrong"] for batch in done) == 1
    assert max(batch.get("differing", 0) for batch in done) == differing
    assert sum(batch["calls"] for batch in done) > 5


def test_what_is_never_right_is_not_held_against_itself():
    done = batches(stress_standins.always_off({}))
    assert len(done) > 1
    assert done == [{"call": "stand-in", "calls": 1, "wrong": 1, "error": "nan"}] * len(done)
    json.dumps(done, allow_nan=False)


def test_after_a_wrong_first_result_a_right_one_is_waited_for():
    errors = iter([0.5, 0.05])
    (call,) = stress_standins.right({})
    call.error = lambda results: next(errors)
    done = batches([call])
    assert [(batch["wrong"], batch.get("error")) for batch in done[:3]] == [(1, 0.5), (0, 0.05), (0, None)]


def test_what_is_right_stays_as_it_was():
    kept = torch.ones(3)
    (call,) = stress_standins.right({})
    call.call = lambda: (kept.clone(),)
    assert sum(batch["wrong"] for batch in batches([call])) == 0
    assert kept.tolist() == [1, 1, 1]

from __future__ import annotations

import copy
import itertools
import json
import os
import time
from pathlib import Path

import pytest
import stress_standins
import torch

from diffsparse.eval import stress_trial
from diffsparse.eval.stress_trial import Subject, repeat, try_subject

SUBJECT = Subject("stand-in", "native", "small", "cpu")


pytestmark = pytest.mark.usefixtures("children_find_the_standins")


def attempt(standin, seconds=0.2, limit=60.0):
    return try_subject(SUBJECT, seconds, limit, f"stress_standins:{standin}")


def is_gone(pid):
    """Whether no such process lives; one that has ended but that nobody has asked for is gone too."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_right_call_is_right_each_time():
    outcome = attempt("right")
    assert (outcome.verdict, outcome.wrong, outcome.ended, outcome.exit_code) == ("right", 0, "", 0)
    assert outcome.right > 10
    assert outcome.errors == {"stand-in": 0.0}


def test_a_result_that_differs_once_is_found():
    outcome = attempt("wrong_on_third_call")
    assert (outcome.verdict, outcome.wrong, outcome.differing, outcome.ended) == ("wrong", 1, 2, "")
    assert outcome.right > 10


def test_a_process_that_aborts_has_died_of_its_signal():
    outcome = attempt("aborts")
    assert (outcome.verdict, outcome.ended, outcome.exit_code) == ("died", "SIGABRT, in stand-in", -6)
    assert any("stress_standins.py" in line for line in outcome.complaints)


def test_a_process_that_raises_has_died_of_the_error():
    outcome = attempt("raises")
    assert outcome.ended == "RuntimeError: an illegal [memory] access was encountered, in stand-in"
    assert (outcome.verdict, outcome.exit_code) == ("died", 1)
    assert outcome.complaints[-1] == "Compile with this or that."


def test_too_little_memory_is_not_the_kernels_fault():
    assert attempt("runs_out_of_memory").verdict == "no memory"


def test_a_process_that_ends_too_soon_has_died():
    outcome = attempt("leaves_without_a_word")
    assert (outcome.verdict, outcome.ended) == ("died", "exit code 0, before the first call")


def test_a_process_that_hangs_says_where_and_is_gone_with_what_it_started():
    outcome = attempt("sleeps", limit=2.0)
    assert (outcome.verdict, outcome.exit_code) == ("hung", None)
    assert outcome.ended == "not done after 2 s, in stand-in"
    pids = [int(pid) for pid in outcome.complaints[0].split()]
    assert len(pids) == 2
    assert all(is_gone(pid) for pid in pids)
    assert any("stress_standins.py" in line for line in outcome.complaints[1:])


def test_what_a_process_that_died_has_started_is_gone_too():
    outcome = attempt("leaves_one_running")
    assert outcome.ended == "exit code 0, before the first call"
    assert is_gone(int(outcome.complaints[0]))


def test_what_libraries_print_is_no_result():
    assert attempt("right_among_noise").verdict == "right"


@pytest.fixture
def found(monkeypatch):
    """What is found of some calls, before each batch and after the last."""
    monkeypatch.setattr(stress_trial, "SHORTEST_BATCH", 0.01)
    return lambda calls, seconds=0.05: [copy.deepcopy(found) for found in repeat(calls, seconds)]


def test_calls_take_turns_and_what_was_found_is_said_before_each_batch(found):
    calls = stress_standins.right({}) + stress_standins.always_off({})
    calls[0].name = "other"
    lines = found(calls)
    assert [line.get("call") for line in lines[:4]] == ["other", "stand-in"] * 2
    assert [(line["right"], line["wrong"]) for line in lines[:4]] == [(0, 0), (1, 0), (1, 1), (2, 1)]
    assert ["done" in line for line in lines] == [False] * (len(lines) - 1) + [True]


def test_short_batches_grow(found):
    right = [line["right"] for line in found(stress_standins.right({}))]
    assert [after - before for before, after in itertools.pairwise(right[:5])] == [1, 1, 2, 4]


def test_the_first_turn_does_not_count(found):
    calls = stress_standins.right({})
    error = calls[0].error
    calls[0].error = lambda results: time.sleep(0.2) or error(results)
    assert len(found(calls, seconds=0.05)) > 2


@pytest.mark.parametrize(("standin", "differing"), [("wrong_on_third_call", 2), ("unwritten_on_third_call", 4)])
def test_one_result_that_differs_is_one_wrong_call(found, standin, differing):
    last = found(getattr(stress_standins, standin)({}))[-1]
    assert (last["wrong"], last["differing"]) == (1, differing)
    assert last["right"] > 4


def test_what_is_never_right_is_not_held_against_itself(found):
    lines = found(stress_standins.always_off({}))
    assert len(lines) > 2
    assert [(line["right"], line["wrong"]) for line in lines] == [(0, turn) for turn in range(len(lines))]
    assert lines[-1]["errors"] == {"stand-in": None}
    json.dumps(lines, allow_nan=False)


def test_after_a_wrong_first_result_a_right_one_is_waited_for(found):
    errors = iter([0.5, 0.05])
    (call,) = stress_standins.right({})
    call.error = lambda results: next(errors)
    lines = found([call])
    assert [(line["right"], line["wrong"]) for line in lines[1:4]] == [(0, 1), (1, 1), (2, 1)]
    # The wrong one is what is to be known.
    assert lines[-1]["errors"] == {"stand-in": 0.5}


def test_what_is_right_stays_as_it_was(found):
    kept = torch.ones(3)
    (call,) = stress_standins.right({})
    call.call = lambda: (kept.clone(),)
    assert found([call])[-1]["wrong"] == 0
    assert kept.tolist() == [1, 1, 1]

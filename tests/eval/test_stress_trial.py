from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest

from diffsparse.eval.stress_calls import Subject
from diffsparse.eval.stress_trial import try_subject

SUBJECT = Subject("stand-in", "native", "small", False, "cpu", 100, 1, 8, 0.5)


@pytest.fixture(autouse=True)
def _children_find_the_standins(monkeypatch):
    folders = (str(Path(__file__).parents[1]), str(Path(__file__).parents[2]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))


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
    assert not outcome.condemns


def test_a_result_that_differs_once_is_found():
    outcome = attempt("wrong_on_third_call")
    assert (outcome.verdict, outcome.wrong, outcome.differing, outcome.ended) == ("wrong", 1, 2, "")
    assert outcome.right > 10
    assert outcome.condemns


def test_a_process_that_aborts_has_died_of_its_signal():
    outcome = attempt("aborts")
    assert (outcome.verdict, outcome.ended, outcome.exit_code) == ("died", "SIGABRT, in stand-in", -6)
    assert any("stress_standins.py" in line for line in outcome.complaints)
    assert outcome.condemns
    assert not dataclasses.replace(outcome, subject=dataclasses.replace(SUBJECT, switched_off=True)).condemns


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

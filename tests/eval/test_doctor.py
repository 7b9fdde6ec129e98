from __future__ import annotations

import argparse
import math

import pytest

from diffsparse.eval import doctor
from diffsparse.eval.doctor import backend_states, versions
from diffsparse.kernels import backends, self_test


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """So that no word is broken over two lines."""
    monkeypatch.setenv("COLUMNS", "200")


def run():
    return doctor.run(argparse.Namespace())


def test_this_machine_can_run_and_says_what(capsys):
    assert run() == 0
    shown = capsys.readouterr().out
    for word in ("torch", "diffusers", "eager", "cpu", "wan", "Sparse attention can run here"):
        assert word in shown


def test_the_eager_backend_is_right_on_the_cpu():
    (eager,) = [s for s in backend_states() if (s.device, s.backend) == ("cpu", "eager")]
    assert eager.works
    assert eager.error < doctor.LARGEST_ERROR


def test_a_backend_that_cannot_run_is_not_tried_and_its_reason_shown(monkeypatch, capsys):
    monkeypatch.setattr(backends, "available_backends", lambda device: {"fancy": "needs a GPU"})
    monkeypatch.setattr(self_test, "self_test", lambda backend, device: pytest.fail("was tried"))
    assert run() == 1
    assert "needs a GPU" in capsys.readouterr().out


@pytest.mark.parametrize("error", [0.5, math.nan])
def test_a_wrong_backend_does_not_count_as_working(monkeypatch, error):
    monkeypatch.setattr(backends, "available_backends", lambda device: {"fancy": None})
    monkeypatch.setattr(self_test, "self_test", lambda backend, device: error)
    assert run() == 1


def test_a_backend_that_breaks_is_reported_and_the_others_still_tried(monkeypatch, capsys):
    def broken_or_good(backend, device):
        if backend == "broken":
            raise RuntimeError("no compiler")
        return 1e-7

    monkeypatch.setattr(backends, "available_backends", lambda device: {"broken": None, "good": None})
    monkeypatch.setattr(self_test, "self_test", broken_or_good)
    assert run() == 0
    assert "no compiler" in capsys.readouterr().out


def test_a_missing_package_is_named_as_such(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    assert versions()["no-such-package"] == "not installed"

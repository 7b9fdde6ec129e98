from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from diffsparse.eval import stress_load
from diffsparse.eval.stress_load import busy_device

IDLE = "stress_idle_load"
pytestmark = pytest.mark.usefixtures("children_find_the_standins")


def test_all_run_while_it_lasts_and_none_after(started):
    with busy_device("cpu", 2, IDLE) as count_running:
        assert count_running() == 2
        started[0].kill()
        started[0].wait()
        assert count_running() == 1
    assert [process.poll() for process in started] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_none_runs_after_an_error(started, error):
    with pytest.raises(error), busy_device("cpu", 2, IDLE):
        raise error
    assert [process.poll() for process in started] == [-signal.SIGKILL] * 2


def test_one_that_does_not_get_to_work_is_an_error_and_ends_the_others(started):
    with pytest.raises(ValueError, match=r"`--processes` 2 do not all get to work on broken: no memory left\. Ask"):
        busy_device("broken", 2, IDLE).__enter__()
    assert all(process.poll() is not None for process in started)


def test_one_that_says_nothing_is_not_waited_for_longer_than_it_may_take(started, monkeypatch):
    monkeypatch.setattr(stress_load, "SECONDS_TO_START", 0.2)
    with pytest.raises(ValueError, match="it said nothing"):
        busy_device("silent", 1, IDLE).__enter__()
    assert all(process.poll() is not None for process in started)


def test_they_end_when_the_parent_is_killed():
    parent = textwrap.dedent(
        f"""
        import subprocess, time
        from diffsparse.eval import stress_load
        popen = subprocess.Popen
        subprocess.Popen = lambda *args, **more: (child := popen(*args, **more), print(child.pid, flush=True))[0]
        with stress_load.busy_device("cpu", 2, {IDLE!r}):
            print("all run", flush=True)
            time.sleep(1000)
        """
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        pids = [int(process.stdout.readline()) for _ in range(2)]
        assert process.stdout.readline() == "all run\n"
        process.kill()
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

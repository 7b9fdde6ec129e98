"""What stands for a kernel in tests of `diffsparse stress`: each function makes the calls of a subject."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time
from types import SimpleNamespace


def repeated(call, error=0.0):
    """A call on the CPU, its first result as far off as `error`, of 0.1 allowed."""
    return SimpleNamespace(name="stand-in", call=call, error=lambda results: error, allowed=0.1)


def right(fields):
    import torch

    return [repeated(lambda: (torch.ones(3), torch.full((2,), -torch.inf)))]


def right_among_noise(fields):
    atexit.register(print, "no JSON")
    return right(fields)


def wrong_on_third_call(fields):
    import torch

    calls = []

    def call():
        calls.append(1)
        out = torch.ones(5)
        if len(calls) == 3:
            out[:2] = 7
        return (out,)

    return [repeated(call)]


def unwritten_on_third_call(fields):
    """Its results lie where the last ones did, as a GPU's do."""
    import torch

    calls, memory = [], torch.empty(4)

    def call():
        calls.append(1)
        if len(calls) == 1:
            return (torch.ones(4),)
        if len(calls) != 3:
            memory.fill_(1)
        return (memory,)

    return [repeated(call)]


def always_off(fields):
    import torch

    return [repeated(lambda: (torch.ones(3),), error=float("nan"))]


def aborts(fields):
    def call():
        os.abort()

    return [repeated(call)]


def raises(fields):
    def call():
        raise RuntimeError("an illegal [memory] access was encountered\nCompile with this or that.")

    return [repeated(call)]


def runs_out_of_memory(fields):
    def call():
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 TiB.")

    return [repeated(call)]


def leaves_without_a_word(fields):
    os._exit(0)


def leaves_one_running(fields):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    print(other.pid, file=sys.stderr, flush=True)
    os._exit(0)


def sleeps(fields):
    """For ever, as does a process that it starts."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    print(os.getpid(), other.pid, file=sys.stderr, flush=True)

    def call():
        time.sleep(1000)

    return [repeated(call)]

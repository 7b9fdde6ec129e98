"""The process in which `diffsparse stress` makes calls: `python -m diffsparse.eval.stress_child CALLS SECONDS SUBJECT`.

CALLS names the function that makes them of the SUBJECT in JSON, as `module:function`. A line of JSON before and after
each batch of calls says what was done, even if the process does not live to the end.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffsparse.eval.child_process import follow_parent

if TYPE_CHECKING:
    from torch import Tensor

    from diffsparse.eval.stress_calls import RepeatedCall

SHORTEST_BATCH = 0.5
"""Seconds; shorter batches grow. Within one, nobody waits for the device."""


def repeat(calls: Sequence[RepeatedCall], seconds: float) -> Iterator[dict[str, Any]]:
    """Make the calls in turn, a batch at a time, and say so before and after each.

    The seconds begin after the first turn, in which kernels are compiled and results compared with float64.
    """
    repeaters = [_Repeater(call) for call in calls]
    end = math.inf
    while True:
        for repeater in repeaters:
            yield {"begins": repeater.call.name}
            yield repeater.batch()
            if time.monotonic() > end:
                return
        end = min(end, time.monotonic() + seconds)


class _Repeater:
    """One call, its first right result, and how many calls make a batch."""

    def __init__(self, call: RepeatedCall) -> None:
        self.call = call
        self.right: Sequence[Tensor] | None = None
        self.batch_size = 1

    def batch(self) -> dict[str, Any]:
        """Make a batch of calls; how many of them were wrong."""
        if self.right is None:
            return self._first()
        import torch

        began = time.monotonic()
        differing = torch.stack([self._differing(self.call.call(), self.right) for _ in range(self.batch_size)])
        done = {
            "call": self.call.name,
            "calls": self.batch_size,
            "wrong": int(differing.count_nonzero()),
            "differing": int(differing.max()),
        }
        if time.monotonic() - began < SHORTEST_BATCH:
            self.batch_size *= 2
        return done

    def _first(self) -> dict[str, Any]:
        """One call, held against float64, until one is right: that is what all later ones have to be."""
        results = self.call.call()
        error = self.call.error(results)
        # Not `error > allowed`, which is false for an error that is not a number.
        if error <= self.call.allowed:
            self.right = results
        return {
            "call": self.call.name,
            "calls": 1,
            "wrong": int(self.right is None),
            "error": error if math.isfinite(error) else str(error),
        }

    @staticmethod
    def _differing(results: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """How many numbers differ, as a tensor on the device, which need not wait for it."""
        import torch

        differing = torch.stack([(a != b).count_nonzero() for a, b in zip(results, right)]).sum()
        for x in results:
            # The next call is given this memory, and must not pass by what it leaves unwritten.
            x.fill_(math.nan)
        return differing


def main(calls: str, seconds: str, subject: str) -> None:
    """Make the calls, and say in the last line that all is over."""
    follow_parent()
    module, _, function = calls.partition(":")
    try:
        for line in repeat(getattr(import_module(module), function)(json.loads(subject)), float(seconds)):
            _say(line)
    except Exception as error:
        # The rest of a long message is advice; the traceback has it.
        first_line = str(error).partition("\n")[0]
        # Words that the errors of torch's allocator and of the driver have in common.
        is_memory = "out of memory" in first_line
        _say({"raised": f"{type(error).__name__}: {first_line}", "out_of_memory": is_memory})
        raise
    _say({"done": True})


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

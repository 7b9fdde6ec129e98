"""One subject of `diffsparse stress`, tried in a process of its own: how many calls were right, and how it ended.

That process is `python -m diffsparse.eval.stress_trial CALLS SECONDS SUBJECT`. A line of JSON before each batch of
calls says how many were right until then, even if the process does not live to the end.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffsparse.eval.child_process import child_process, follow_parent

if TYPE_CHECKING:
    from torch import Tensor

DENSE = "dense"
"""The control: PyTorch's own attention, at the full size. If that fails too, it is not our kernels."""
SIZES = ("full", "small")
CALLS = "diffsparse.eval.stress_calls:calls_of"
RIGHT, WRONG, DIED, HUNG, NO_MEMORY = "right", "wrong", "died", "hung", "no memory"
"""NO_MEMORY: the device had too little; nothing is said of the kernel. WRONG and HUNG hold for processes that lived."""
SHORTEST_BATCH = 0.5
"""Seconds; shorter batches grow. Within one, nobody waits for the device."""
NOTHING_YET: dict[str, Any] = {"right": 0, "wrong": 0, "differing": 0, "errors": {}}


@dataclass(frozen=True)
class Subject:
    """What one process calls again and again.

    Attributes:
        backend: one of BACKENDS in `kernels/backends.py`, or DENSE.
        size: "full" is a call as of a model, "small" are many with all options.
    """

    backend: str
    precision: str
    size: str
    device: str

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.backend} {self.precision}, {self.size}"


@dataclass(frozen=True)
class RepeatedCall:
    """One call on inputs that stay: its results are the same, bit by bit, each time that it is right.

    Attributes:
        error: how far results are off, relative.
        allowed: how far they may be.
    """

    name: str
    call: Callable[[], Sequence[Tensor]]
    error: Callable[[Sequence[Tensor]], float]
    allowed: float


@dataclass(frozen=True)
class Outcome:
    """What became of a subject.

    Attributes:
        right: calls whose results were right.
        wrong: calls whose results were not.
        differing: in how many numbers, at most, results of a call differed from its first right ones.
        errors: of the first result of each call, relative to float64; None for what is not a number.
        ended: how the process ended, and in which call: empty if as it should.
        exit_code: of the process, negative for a signal; None if it hung.
        complaints: the last lines of its standard error.
        seconds: that the process ran.
    """

    subject: Subject
    verdict: str
    right: int
    wrong: int
    differing: int
    errors: dict[str, float | None]
    ended: str
    exit_code: int | None
    complaints: list[str]
    seconds: float


def try_subject(subject: Subject, seconds: float, limit: float, calls: str = CALLS) -> Outcome:
    """Have a process make calls for so many seconds; after `limit` seconds it is killed.

    `calls` names the function that gives them, as `module:function`; it takes the fields of the subject.
    """
    began = time.monotonic()
    with child_process(__name__, calls, str(seconds), json.dumps(asdict(subject))) as child:
        has_hung = not child.wait(limit)
        if has_hung:
            child.say_where()
        lines, complaints = child.lines(), child.last_complaints()
    exit_code = child.process.returncode
    said = json.loads(lines[-1]) if lines else NOTHING_YET
    verdict, ended = WRONG if said["wrong"] else RIGHT, ""
    if has_hung:
        verdict, ended = HUNG, f"not done after {limit:g} s{', and cannot be killed' * child.runs}"
    elif exit_code != 0 or "done" not in said:
        verdict = NO_MEMORY if said.get("out_of_memory") else DIED
        ended = {-number: number.name for number in signal.Signals}.get(exit_code, f"exit code {exit_code}")
        if "raised" in said:
            ended = said["raised"] if exit_code == 1 else f"{said['raised']}, then {ended}"
    if ended:
        ended += f", in {said['call']}" if "call" in said else ", before the first call"
    return Outcome(
        subject=subject,
        verdict=verdict,
        **{name: said[name] for name in NOTHING_YET},
        ended=ended,
        exit_code=None if has_hung else exit_code,
        complaints=complaints if ended else [],
        seconds=round(time.monotonic() - began, 1),
    )


def repeat(calls: Sequence[RepeatedCall], seconds: float) -> Iterator[dict[str, Any]]:
    """Make the calls in turn, a batch at a time: what was found, before each batch and, with "done", after the last.

    The seconds begin after the first turn, in which kernels are compiled and results compared with float64.
    """
    assert calls
    found = NOTHING_YET | {"errors": {}}
    right_results: dict[str, Sequence[Tensor]] = {}
    batch_sizes = dict.fromkeys((call.name for call in calls), 1)
    end = math.inf
    for number, call in enumerate(itertools.cycle(calls)):
        if number == len(calls):
            end = time.monotonic() + seconds
        if time.monotonic() > end:
            break
        yield found | {"call": call.name}
        began, size, wrong = time.monotonic(), batch_sizes[call.name], 0
        if call.name in right_results:
            import torch

            right = right_results[call.name]
            differing = torch.stack([_differing(call.call(), right) for _ in range(size)])
            wrong = int(differing.count_nonzero())
            found["differing"] = max(found["differing"], int(differing.max()))
            if time.monotonic() - began < SHORTEST_BATCH:
                batch_sizes[call.name] *= 2
        else:
            # Held against float64, until one is right: that is what all later ones have to be.
            results = call.call()
            error = call.error(results)
            found["errors"].setdefault(call.name, error if math.isfinite(error) else None)
            # Not `error > allowed`, which is false for an error that is not a number.
            if error <= call.allowed:
                right_results[call.name] = results
            else:
                wrong = 1
        found["wrong"] += wrong
        found["right"] += size - wrong
    yield found | {"done": True}


def _differing(results: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """How many numbers differ, as a tensor on the device, which need not wait for it."""
    import torch

    differing = torch.stack([(a != b).count_nonzero() for a, b in zip(results, right)]).sum()
    for x in results:
        # The next call is given this memory, and must not pass by what it leaves unwritten.
        x.fill_(math.nan)
    return differing


def _main(calls: str, seconds: str, subject: str) -> None:
    """Make the calls, and say what was found."""
    follow_parent()
    # What libraries print goes to where they complain, and not between these lines.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    said = NOTHING_YET
    module, _, function = calls.partition(":")
    try:
        for said in repeat(getattr(import_module(module), function)(json.loads(subject)), float(seconds)):
            print(json.dumps(said), file=output, flush=True)
    except Exception as error:
        # The rest of a long message is advice; the traceback has it.
        first_line = str(error).partition("\n")[0]
        # Words that the errors of torch's allocator and of the driver have in common.
        is_memory = "out of memory" in first_line
        said = said | {"raised": f"{type(error).__name__}: {first_line}", "out_of_memory": is_memory}
        print(json.dumps(said), file=output, flush=True)
        raise


if __name__ == "__main__":
    _main(*sys.argv[1:])

"""One subject of `diffsparse stress`, tried in a process of its own: how many calls were right, and how it ended."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffsparse.eval.child_process import child_process
from diffsparse.eval.stress_calls import CALLS, Subject

RIGHT, WRONG, DIED, HUNG, NO_MEMORY = "right", "wrong", "died", "hung", "no memory"
"""NO_MEMORY: the device had too little; nothing is said of the kernel. WRONG and HUNG hold for processes that lived."""


@dataclass(frozen=True)
class Outcome:
    """What became of a subject.

    Attributes:
        right: calls whose results were right.
        wrong: calls whose results were not.
        differing: in how many numbers, at most, results of a call differed from its first right ones.
        errors: of the first result of each call, relative to float64; "nan" and "inf" as text.
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
    errors: dict[str, float | str]
    ended: str
    exit_code: int | None
    complaints: list[str]
    seconds: float

    @property
    def condemns(self) -> bool:
        """Whether this should not be: it was not right, and is not switched off for that."""
        return self.verdict != RIGHT and not self.subject.switched_off


def try_subject(subject: Subject, seconds: float, limit: float, calls: str = CALLS) -> Outcome:
    """Have a process make calls for so many seconds; after `limit` seconds it is killed.

    `calls` names the function that makes them, as `module:function`; it takes the fields of the subject.
    """
    began = time.monotonic()
    arguments = calls, str(seconds), json.dumps(asdict(subject))
    with child_process("diffsparse.eval.stress_child", *arguments) as child:
        exit_code = child.wait(limit)
        hung_for_good = False
        if exit_code is None:
            child.say_where()
            hung_for_good = not child.kill()
        lines, complaints = _own_lines(child.lines()), child.last_complaints()
    batches = [line for line in lines if "calls" in line]
    wrong = sum(line["wrong"] for line in batches)
    right = sum(line["calls"] for line in batches) - wrong
    last = lines[-1] if lines else {}
    verdict, ended = _verdict(exit_code, last, limit, hung_for_good)
    if verdict != RIGHT:
        begun = [line["begins"] for line in lines if "begins" in line]
        ended += f", in {begun[-1]}" if begun else ", before the first call"
    elif wrong:
        verdict = WRONG
    return Outcome(
        subject=subject,
        verdict=verdict,
        right=right,
        wrong=wrong,
        differing=max((line.get("differing", 0) for line in batches), default=0),
        # Where the first was wrong there are more: the first of each stays.
        errors={line["call"]: line["error"] for line in reversed(batches) if "error" in line},
        ended=ended,
        exit_code=exit_code,
        complaints=complaints if verdict != RIGHT else [],
        seconds=round(time.monotonic() - began, 1),
    )


def _own_lines(lines: Sequence[str]) -> list[dict[str, Any]]:
    """What the child has said; libraries may have printed in between."""
    found = []
    for line in lines:
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict):
            found.append(said)
    return found


def _verdict(exit_code: int | None, last: dict[str, Any], limit: float, hung_for_good: bool) -> tuple[str, str]:
    """How a process ended, leaving aside whether its numbers were right."""
    if exit_code is None:
        return HUNG, f"not done after {limit:g} s{', and cannot be killed' if hung_for_good else ''}"
    if exit_code == 0 and "done" in last:
        return RIGHT, ""
    how = f"exit code {exit_code}"
    if exit_code < 0:
        how = _name_of_signal(-exit_code)
    if "raised" in last:
        how = last["raised"] if exit_code == 1 else f"{last['raised']}, then {how}"
    return NO_MEMORY if last.get("out_of_memory") else DIED, how


def _name_of_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

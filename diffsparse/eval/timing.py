"""Timing calls in turn, so that whatever else the machine does slows all alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from diffsparse.speed_check import seconds_of

if TYPE_CHECKING:
    import torch

SHORTEST_TURN = 0.02
"""Seconds of work below which the start of a call, and the clock, weigh too much."""
SETTLING = 0.1
"""Seconds that a GPU spends on a call before it is timed.

Its clocks follow the power that its work takes, with a delay: without this they are those of the call before. 25 % of
Wan's blocks in bf16 took an H200 43.8 ms after calls in 8 bits, and 51.3 ms after others in bf16.
"""


def seconds_in_rounds(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every call in every round, after two rounds that are not counted.

    A call too short for the clock is repeated within its turn, and the mean taken. On a GPU each turn begins with some
    that are not counted either.
    """
    first = {name: seconds_of(call, device) for name, call in calls.items()}
    first = {name: min(first[name], seconds_of(call, device)) for name, call in calls.items()}
    repeats = {name: max(1, math.ceil(SHORTEST_TURN / seconds)) for name, seconds in first.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if device.type != "cpu":
                seconds_of(call, device, math.ceil(SETTLING / first[name]))
            seconds[name].append(seconds_of(call, device, repeats[name]))
    return seconds

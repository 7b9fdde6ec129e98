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


def seconds_in_rounds(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every call in every round, after two rounds that are not counted.

    A call too short for the clock is repeated within its turn, and the mean taken.
    """
    first = {name: seconds_of(call, device) for name, call in calls.items()}
    first = {name: min(first[name], seconds_of(call, device)) for name, call in calls.items()}
    repeats = {name: max(1, math.ceil(SHORTEST_TURN / seconds)) for name, seconds in first.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device, repeats[name]))
    return seconds

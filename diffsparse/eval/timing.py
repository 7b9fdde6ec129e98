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


def seconds_in_turn(
    one: Callable[[], object], other: Callable[[], object], repeats: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of each call of one and other, called in turn, after a first call of each that is not counted."""
    pairs = [(seconds_of(one, device), seconds_of(other, device)) for _ in range(repeats + 1)][1:]
    return [a for a, _ in pairs], [b for _, b in pairs]


def seconds_in_rounds(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every call in every round, after a round that is not counted.

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

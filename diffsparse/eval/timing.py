"""Timing two calls in turn, so that whatever else the machine does slows both alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seconds_in_turn(
    one: Callable[[], object], other: Callable[[], object], repeats: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of each call of one and other, called in turn, after a first call of each that is not counted."""
    import torch

    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    pairs = [(seconds(one), seconds(other)) for _ in range(repeats + 1)][1:]
    return [a for a, _ in pairs], [b for _, b in pairs]

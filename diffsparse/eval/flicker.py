"""Temporal flicker: how far the changes from frame to frame differ between two videos."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffsparse.eval.metrics import Frames, as_unit_floats, check_same_shape


class Flicker:
    """Scores windows of two videos one after the other; between them it keeps the last difference.

    The score of two frames that follow each other is the mean of |(a' − a) − (b' − b)| over pixels and R, G, B, for
    values between 0 and 1: 0 where both videos change alike, even if they look different.
    """

    def __init__(self) -> None:
        self._last: NDArray[Any] | None = None

    def __call__(self, a: Frames, b: Frames) -> list[float]:
        """The scores of the next frames [F, H, W, 3], each with the frame before: one less for the first window."""
        check_same_shape(a, b)
        scores = []
        for x, y in zip(a, b):
            # What changes in one and not in the other is the change of their difference.
            difference = as_unit_floats(x).astype(np.float64) - as_unit_floats(y)
            if self._last is not None:
                scores.append(float(np.abs(difference - self._last).mean()))
            self._last = difference
        return scores

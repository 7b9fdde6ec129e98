"""What a mean over a few videos is worth: its interval, and whether one config beats another on the same videos."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95


def of_differences(differences: Sequence[float]) -> dict[str, Any]:
    """What is known of differences on the same videos, at least one: their number, mean, interval and sign test."""
    return {
        "num_pairs": len(differences),
        "mean": math.fsum(differences) / len(differences),
        "interval": bootstrap_interval(differences),
        "sign_test": sign_test(differences),
    }


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean by the percentile bootstrap (Efron 1979); None below two values.

    The same values give the same interval. Of a handful of values it is too narrow.
    """
    if len(values) < 2:
        return None
    array = np.asarray(values, dtype=np.float64)
    random = np.random.default_rng(0)
    # One resample a row, in slices that bound the memory.
    slices = [array[random.integers(0, len(array), (RESAMPLES // 10, len(array)))].mean(axis=1) for _ in range(10)]
    low, high = np.quantile(np.concatenate(slices), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def sign_test(differences: Sequence[float]) -> float:
    """How likely differences as one-sided as these are, if either sign were as likely; ties left out.

    The exact two-sided test: 1 where nothing speaks for a difference.
    """
    num_above = sum(difference > 0 for difference in differences)
    num_below = sum(difference < 0 for difference in differences)
    total = num_above + num_below
    tail = sum(math.comb(total, k) for k in range(min(num_above, num_below) + 1)) / 2**total
    return min(1.0, 2 * tail)

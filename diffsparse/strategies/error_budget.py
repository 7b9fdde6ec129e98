"""The blocks of a layer shared out over its heads, to those whose error falls most by them."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor


def share_out(errors: Tensor, counts: list[int], mean: int) -> Tensor:
    """How many blocks each head gets, [H] int64: together `mean` for each, and the sum of the errors is small.

    The error of a head is taken as the convex curve under its measured points, so that the steepest pieces of all
    heads, one after another, are the best use of any budget. The last piece that fits is cut where the budget ends.
    Nothing is synchronised with the host.

    Args:
        errors: [H, N], of each head at each of the counts, in one unit for all heads. Infinite counts as very large.
        counts: N numbers of blocks, ascending, `mean` among them.
        mean: blocks a head.
    """
    if len(counts) == 1:
        return torch.full((len(errors),), mean, device=errors.device)
    steps = on_device(tuple(after - before for before, after in itertools.pairwise(counts)), errors.device)
    finite = errors.nan_to_num(nan=torch.inf, posinf=torch.inf)
    largest = finite.masked_fill(finite.isinf(), 0.0).amax()
    finite = torch.where(finite.isinf(), 1e3 * largest + 1.0, finite)
    pieces = -_convex(finite, counts).diff(dim=-1)  # [H, N - 1], what each step takes off the error
    slopes = pieces / steps.clamp_min(1)
    # Stable, so that heads that fall alike are served in their order, and the pieces of one head in theirs.
    order = torch.argsort(slopes.flatten(), descending=True, stable=True)
    wanted = steps.expand(len(errors), -1).flatten()[order]
    left = len(errors) * (mean - counts[0])
    given = torch.minimum(wanted, (left - (wanted.cumsum(0) - wanted)).clamp_min(0))
    shares = torch.zeros_like(given).scatter_(0, order, given).view(len(errors), -1)
    return counts[0] + shares.sum(-1)


@functools.lru_cache(maxsize=64)
def on_device(numbers: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The numbers as a tensor. Kept, since copying them waits for the device."""
    return torch.tensor(numbers, device=device, dtype=dtype)


def _convex(errors: Tensor, counts: list[int]) -> Tensor:
    """The largest convex curve that nowhere lies above the points (counts, errors), at the counts: [H, N]."""
    left, right, shares = _chords(tuple(counts), errors.device)
    return torch.lerp(errors[:, left], errors[:, right], shares).amin(-1)


@functools.lru_cache(maxsize=64)
def _chords(counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Between which two points every straight line over each point goes, and how far along, each [N, N * N].

    Pairs on one side of the point stand for the point itself.
    """
    places = range(len(counts))
    pairs = [
        (at, left, right) if left < at < right else (at, at, at)
        for at, left, right in itertools.product(places, repeat=3)
    ]
    shares = [(counts[at] - counts[left]) / max(counts[right] - counts[left], 1) for at, left, right in pairs]
    left, right = (on_device(ends, device).view(len(counts), -1) for ends in tuple(zip(*pairs))[1:])
    return left, right, torch.tensor(shares, dtype=torch.float32, device=device).view(len(counts), -1)

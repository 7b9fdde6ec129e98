"""Which chunks are selected by their gates, as VMoBA does it (arXiv:2506.23858). Of equals the first is taken."""

from __future__ import annotations

import torch
from torch import Tensor


def best_by_threshold(gates: Tensor, own: Tensor, threshold: float) -> Tensor:
    """The best chunks that with the own ones make up `threshold` of the sum of the gates: [..., N] bool.

    Gates are scaled to 0–1 first. Beside the own chunks at least one is selected, and the one with which the
    threshold is reached is still among them.

    Args:
        gates: [..., N], what competes.
        own: [..., N] bool, what is selected in any case.
    """
    low, high = gates.aminmax(dim=-1, keepdim=True)
    scaled = (gates - low) / torch.where(high - low <= 1e-6, 1.0, high - low)
    total = scaled.sum(-1, keepdim=True) + 1e-6
    missing = (threshold - (scaled * own).sum(-1, keepdim=True) / total).clamp(min=0)
    # Own chunks come behind all others, and add nothing to them.
    others, place = scaled.masked_fill(own, -1.0).sort(dim=-1, descending=True, stable=True)
    is_reached = others.clamp(min=0).cumsum(-1) / total >= missing
    taken = torch.ones_like(is_reached)
    taken[..., 1:] = ~is_reached[..., :-1]
    return torch.zeros_like(taken).scatter(-1, place, taken) | own


def best_by_number(gates: Tensor, own: Tensor, number: int) -> Tensor:
    """The best `number` chunks, the own ones first: [..., N] bool. More, where there are more own ones.

    gates [..., N], own [..., N] bool.
    """
    place = gates.masked_fill(own, torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :number]
    return torch.zeros_like(gates, dtype=torch.bool).scatter(-1, place, True) | own

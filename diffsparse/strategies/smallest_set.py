"""The fewest blocks that together hold a share of the softmax's mass."""

from __future__ import annotations

import torch
from torch import Tensor


def smallest_set(mass: Tensor, share: float, always: Tensor | None = None) -> Tensor:
    """In each row the fewest entries whose mass reaches `share` of the row's: bool, the shape of `mass`.

    Each row keeps at least one entry, how many more is its own affair. Of equal entries the first ones are kept.
    Nothing is synchronised with the host.

    Args:
        mass: [..., N], none negative, in float32.
        share: 0–1, of the sum of a row.
        always: bool, broadcast to `mass`, entries that are kept in any case: their mass counts first, so that the
            set is the smallest of those that contain them.
    """
    rank = mass if always is None else mass.masked_fill(always, torch.inf)
    order = torch.argsort(rank, dim=-1, descending=True, stable=True)
    reached = mass.gather(-1, order).cumsum(-1)
    # An entry is needed if those before it do not reach the share; the first one is needed in any case.
    needed = torch.ones_like(mass, dtype=torch.bool)
    needed[..., 1:] = reached[..., :-1] < share * reached[..., -1:]
    kept = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, order, needed)
    return kept if always is None else kept | always

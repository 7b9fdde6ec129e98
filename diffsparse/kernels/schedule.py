"""In which order a kernel takes the query blocks of all heads, so that no long one is left to the end."""

from __future__ import annotations

import torch
from torch import Tensor


def heavy_first(counts: Tensor) -> Tensor:
    """The query blocks of all heads, numbered (b * H + h) * Q + row, in the order to start them: [B * H * Q] int32.

    `counts` [B, H, Q] are how many key blocks each sees. First the rows with more than twice what their head has on
    average, such as those of text; then head by head, the fullest first, so that programs that run at a time read the
    same keys and values. Within a head too the fullest rows come first: those that run at a time then see about as
    many blocks, come through their ascending lists together, and find in the cache what the others have read. What is
    left at the end is short.
    """
    totals = counts.sum(-1, keepdim=True)  # [B, H, 1] int64: all blocks of a head may be more than 32 bits count
    is_heavy = counts > 2 * totals // counts.shape[-1]
    places = totals.flatten().argsort(stable=True, descending=True).argsort().view_as(totals)
    weights = (counts - places * 2**32).masked_fill(is_heavy, torch.iinfo(totals.dtype).max)
    return weights.flatten().argsort(stable=True, descending=True).to(torch.int32)

"""A number of key blocks for each query block: those with the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor


def top_blocks(scores: Tensor, count: int | Tensor, always: Tensor | None = None) -> Tensor:
    """In each row the `count` highest of scores [..., K], those of `always` among them: bool [..., K].

    `count` is a number, or integers that broadcast to [..., 1]. `always` is bool, broadcast to `scores`; a row where it
    names more than `count` keeps them all.
    """
    rank = scores if always is None else scores.masked_fill(always, torch.inf)
    kept: Tensor | bool = True
    if isinstance(count, int):
        blocks = rank.topk(min(count, scores.shape[-1]), dim=-1, sorted=False).indices
    else:
        blocks = rank.argsort(dim=-1, descending=True, stable=True)
        kept = (torch.arange(scores.shape[-1], device=scores.device) < count).expand_as(scores)
    visible = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, blocks, kept)
    return visible if always is None else visible | always

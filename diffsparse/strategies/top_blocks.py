"""A fixed number of key blocks for each query block: those with the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor


def top_blocks(scores: Tensor, count: int, always: Tensor | None = None) -> Tensor:
    """In each row the `count` highest of scores [..., K], those of `always` among them: bool [..., K].

    `always` is bool, broadcast to `scores`; a row where it names more than `count` keeps them all.
    """
    rank = scores if always is None else scores.masked_fill(always, torch.inf)
    highest = rank.topk(min(count, scores.shape[-1]), dim=-1, sorted=False).indices
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, highest, True)
    return kept if always is None else kept | always

"""A fixed number of key blocks for each query block: those with the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor


def top_blocks(scores: Tensor, count: int, always: Tensor) -> Tensor:
    """In each row the `count` highest of scores [..., Q, K], those of `always` [Q, K] among them: bool [..., Q, K].

    A row where `always` names more than `count` keeps them all.
    """
    rank = scores.masked_fill(always, torch.inf)
    highest = rank.topk(min(count, scores.shape[-1]), dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, highest, True) | always

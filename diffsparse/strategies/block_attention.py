"""Exact attention, summed by blocks: what a mask would hold of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.block_mask import num_blocks
from diffsparse.strategies.planning_memory import slices


def block_attention(
    query: Tensor, key: Tensor, query_block_size: int, key_block_size: int, key_length: Tensor | None = None
) -> Tensor:
    """The share of attention that each query block gives each key block, [B, H, Q, K] float32; each row sums to 1.

    It is the softmax of all scores, a mean over the queries of a block and a sum over its keys, so it costs as much as
    dense attention and more. Query [B, H, S, D] comes scaled. Keys at or beyond `key_length` [B] do not exist.
    """
    batch, heads, tokens, _ = query.shape
    key_blocks = num_blocks(tokens, key_block_size)
    shape = batch, heads, num_blocks(tokens, query_block_size), key_blocks
    shares = query.new_empty(shape, dtype=torch.float32)
    if key_length is not None:
        beyond = (torch.arange(tokens, device=key.device) >= key_length[:, None])[:, None, None]
    # Float32 scores of one query block of each head, and their softmax.
    for some in slices(heads, 8 * batch * query_block_size * tokens):
        for block in range(shares.shape[2]):
            rows = query[:, some, block * query_block_size : (block + 1) * query_block_size]
            scores = (rows @ key[:, some].transpose(-1, -2)).float()
            if key_length is not None:
                scores.masked_fill_(beyond, -torch.inf)
            attention = F.pad(scores.softmax(-1).mean(2), (0, key_blocks * key_block_size - tokens))
            shares[:, some, block] = attention.unflatten(2, (key_blocks, key_block_size)).sum(3)
    return shares

"""Exact attention, of all queries or of a few, and its sums over blocks: what a mask would hold of it."""

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
    shape = batch, heads, num_blocks(tokens, query_block_size), num_blocks(tokens, key_block_size)
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
            shares[:, some, block] = by_block(scores.softmax(-1).mean(2), key_block_size)
    return shares


def scores_of_rows(rows: Tensor, key: Tensor, key_length: Tensor | None) -> Tensor:
    """The scores of a few queries, scaled, [B, H, R, D] and all keys [B, H, S, D]: [B, H, R, S] float32.

    -inf for keys at or beyond `key_length` [B], which do not exist.
    """
    scores = rows.float() @ key.float().transpose(-1, -2)
    if key_length is not None:
        beyond = torch.arange(key.shape[2], device=key.device) >= key_length[:, None]
        scores.masked_fill_(beyond[:, None, None], -torch.inf)
    return scores


def by_block(x: Tensor, block_size: int) -> Tensor:
    """The sums of x [..., S] over blocks of its last dimension, [..., blocks]."""
    return F.pad(x, (0, -x.shape[-1] % block_size)).unflatten(-1, (-1, block_size)).sum(-1)

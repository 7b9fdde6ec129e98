"""Columns and diagonals of a map of blocks: which of them hold the attention of a few sampled queries."""

from __future__ import annotations

import torch
from torch import Tensor

from diffsparse.strategies.block_attention import by_block, scores_of_rows


def block_mass(query: Tensor, key: Tensor, block_size: int, key_length: Tensor | None = None) -> Tensor:
    """The softmax of sampled queries [B, H, R, D], scaled, over key [B, H, S, D], by key block: [B, H, R, K] float32.

    Keys at or beyond `key_length` [B] do not exist.
    """
    return by_block(scores_of_rows(query, key, key_length).softmax(-1), block_size)


def column_mass(mass: Tensor) -> Tensor:
    """What each key block has of the sampled rows' attention [B, H, R, K], on average: [B, H, K]."""
    return mass.mean(2)


def diagonal_mass(mass: Tensor, row_blocks: Tensor) -> Tensor:
    """What each diagonal has of the sampled rows' attention [B, H, R, K], on average: [B, H, 2 * K - 1].

    Diagonal d holds the key blocks d - (K - 1) places behind the query block; `row_blocks` [R] says in which query
    block each row is.
    """
    blocks = mass.shape[3]
    # For each row the key block on each diagonal.
    on_diagonal = torch.arange(2 * blocks - 1, device=mass.device) - (blocks - 1) + row_blocks[:, None]
    exists = (on_diagonal >= 0) & (on_diagonal < blocks)
    index = on_diagonal.clamp(min=0, max=blocks - 1).expand(*mass.shape[:3], -1)
    return (mass.gather(3, index) * exists).mean(2)


def columns_and_diagonals(columns: Tensor, diagonals: Tensor) -> Tensor:
    """The block map [..., K, K] bool of kept columns [..., K] and diagonals [..., 2 * K - 1]."""
    blocks = columns.shape[-1]
    place = torch.arange(blocks, device=columns.device)
    diagonal = (place - place[:, None] + blocks - 1).flatten()
    return columns[..., None, :] | diagonals.index_select(-1, diagonal).unflatten(-1, (blocks, blocks))

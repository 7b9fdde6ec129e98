"""Tokens of every head into an order of its own, and back: in one pass each, on a GPU as fast as memory allows."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from diffsparse.kernels.first_use import kernels_on


def in_order(x: Tensor, order: Tensor | None) -> Tensor:
    """The tokens of x [B, H, S, D] in an order [H|1, S] int64; x itself if None."""
    return x if order is None else gather_tokens(x, order)


def gather_tokens(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of x [B, H, S, D] in the order [H|1, S] int64 of each head: [B, H, S, D] contiguous."""
    kernels = _kernels(x.device)
    if kernels is not None and x.stride(3) == 1:
        gathered: Tensor = kernels.gather_tokens(x, order)
        return gathered
    batch, heads, tokens, dim = x.shape
    if x.transpose(1, 2).is_contiguous():  # as projections leave it: [B, S, H, D] in memory
        rows = x.transpose(1, 2).reshape(-1, dim)
        head = torch.arange(heads, device=x.device)[:, None]
        place = order * heads + head  # [H, S]
    else:
        rows = x.reshape(-1, dim)
        place = _rows_by_head(order, heads)
    return rows.index_select(0, _for_batch(place, batch)).view(batch, heads, tokens, dim)


def scatter_tokens(x: Tensor, order: Tensor) -> Tensor:
    """What `gather_tokens` was given for x [B, H, S, D] and the order [H|1, S] int64.

    The result is [B, H, S, D] with the memory layout [B, S, H, D], which output projections want.
    """
    kernels = _kernels(x.device)
    if kernels is not None and x.stride(3) == 1:
        scattered: Tensor = kernels.scatter_tokens(x, order)
        return scattered
    batch, heads, tokens, dim = x.shape
    inverse = torch.empty_like(order).scatter_(1, order, torch.arange(tokens, device=x.device).expand_as(order))
    place = _rows_by_head(inverse, heads).T.contiguous()  # [S, H]
    rows = x.reshape(-1, dim).index_select(0, _for_batch(place, batch))
    return rows.view(batch, tokens, heads, dim).transpose(1, 2)


def _rows_by_head(places: Tensor, heads: int) -> Tensor:
    """Row numbers [H, S] of the places [H|1, S] in a tensor of rows [H * S, D]."""
    return places + torch.arange(heads, device=places.device)[:, None] * places.shape[1]


def _for_batch(rows: Tensor, batch: int) -> Tensor:
    """Row numbers of one batch element [n, m], repeated for each element: [B * n * m]."""
    if batch == 1:
        return rows.reshape(-1)
    offset = torch.arange(batch, device=rows.device)[:, None] * rows.numel()
    return (rows.reshape(1, -1) + offset).reshape(-1)


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernels where they run and do what they should, seen on a small tensor; None elsewhere."""

    def check(kernels: ModuleType) -> bool:
        x = torch.arange(2 * 3 * 70 * 8, device=device, dtype=torch.float32).view(2, 70, 3, 8).transpose(1, 2)
        generator = torch.Generator().manual_seed(0)
        order = torch.stack([torch.randperm(70, generator=generator) for _ in range(3)]).to(device)
        there = kernels.gather_tokens(x, order)
        right = torch.equal(there, x.gather(2, order[None, :, :, None].expand_as(x)))
        return right and torch.equal(kernels.scatter_tokens(there, order), x)

    return kernels_on(device, "reorder_triton", "reordering tokens", check)

"""What skipping a key block would do to the output of a query, for a few queries against all blocks: in one pass."""

from __future__ import annotations

import functools
import itertools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.kernels.first_use import kernels_on
from diffsparse.kernels.pooling import block_token_counts
from diffsparse.kernels.reorder import in_order
from diffsparse.strategies.planning_memory import blockwise_head_slices, blockwise_row_slices


def block_impacts(
    query: Tensor,
    output: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    *,
    scale: float,
    tail: bool,
    order: Tensor | None = None,
    key_length: Tensor | None = None,
) -> Tensor:
    """How far skipping each key block would move the output of each query, [B, H, R, K] float32.

    As a logarithm, up to a number of each query's own: of the sum over the block's keys of weight times distance of the
    value from the output, squared. Where the block enters as its mean instead, each weight counts less the mean key's.
    A block without a key has -inf.

    Args:
        query, output: [B, H, R, D] float32, a few queries and about what attention gives them.
        key, value: [B, H, S, D].
        block_size: tokens a key block.
        scale: factor on the products of queries and keys.
        tail: whether a block that is skipped enters as its mean.
        order: [H|1, S] int64, the order of keys and values that is cut into blocks; None for their own.
        key_length: [B], keys at or beyond this place of the order do not exist.
    """
    kernels = _kernels(key.device)
    if kernels is not None and kernels.fits(key.shape[3], block_size, key.element_size()):
        options = {"scale": scale, "tail": tail, "order": order, "key_length": key_length}
        impacts: Tensor = kernels.block_impacts(query, output, key, value, block_size, **options)
        return impacts
    return _block_impacts(query, output, key, value, block_size, scale, tail, order, key_length)


def _block_impacts(
    query: Tensor,
    output: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    scale: float,
    tail: bool,
    order: Tensor | None,
    key_length: Tensor | None,
) -> Tensor:
    """The specification of `block_impacts`, a few heads and queries at a time."""
    is_beyond = _is_beyond(key.shape[2], block_size, key_length, key.device)
    query = query * scale
    parts = []
    for some in blockwise_head_slices(key, query.shape[2], block_size):
        of_some = order if order is None or len(order) == 1 else order[some]
        keys, values = (in_order(x[:, some], of_some) for x in (key, value))
        parts.append(_of_some(query[:, some], output[:, some], keys, values, block_size, is_beyond, tail))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _is_beyond(tokens: int, block_size: int, key_length: Tensor | None, device: torch.device) -> Tensor | None:
    """Which places of each block have no key, [B|1, 1, K, block_size, 1]; None where all have one."""
    if key_length is None and tokens % block_size == 0:
        return None
    counts = block_token_counts(tokens, block_size, key_length, device)  # [B|1, K]
    return torch.arange(block_size, device=device)[:, None] >= counts[:, None, :, None, None]


def _of_some(
    query: Tensor,
    output: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    is_beyond: Tensor | None,
    tail: bool,
) -> Tensor:
    """Of heads whose keys and values are in their order, a few queries at a time."""
    keys, values = key.float(), value.float()
    if (missing := -keys.shape[2] % block_size) > 0:
        keys, values = (F.pad(x, (0, 0, 0, missing)) for x in (keys, values))
    keys, values = (x.unflatten(2, (-1, block_size)) for x in (keys, values))  # [B, H, K, block_size, D]
    if is_beyond is not None:
        keys, values = (x.masked_fill(is_beyond, 0.0) for x in (keys, values))
    parts = [
        _of_queries(query[:, :, rows], output[:, :, rows], keys, values, is_beyond, tail)
        for rows in blockwise_row_slices(key, query.shape[2], block_size)
    ]
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _of_queries(
    query: Tensor, output: Tensor, keys: Tensor, values: Tensor, is_beyond: Tensor | None, tail: bool
) -> Tensor:
    """Of keys and values [B, H, K, block_size, D], zero where none exists."""
    scores = (keys.flatten(2, 3) @ query.mT).unflatten(2, keys.shape[2:4])  # [B, H, K, block_size, R]
    if is_beyond is not None:
        scores.masked_fill_(is_beyond, -torch.inf)
    peaks = scores.amax(3, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)
    weights = scores.sub_(peaks).exp_()
    if tail:
        counts = keys.shape[3] if is_beyond is None else (keys.shape[3] - is_beyond.sum(3)).clamp_min_(1)
        mean_scores = (keys.sum(3) / counts) @ query.mT  # [B, H, K, R]
        weights -= (mean_scores[:, :, :, None] - peaks).exp_()
        if is_beyond is not None:
            weights.masked_fill_(is_beyond, 0.0)
    moves = weights.mT @ values  # [B, H, K, R, D]
    moves.addcmul_(weights.sum(3)[..., None], output[:, :, None], value=-1.0)
    return (2 * (peaks[:, :, :, 0] + torch.linalg.vector_norm(moves, dim=-1).log_())).mT


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernel for `block_impacts`, where it runs and is right on a small input; None elsewhere."""

    def check(kernels: ModuleType) -> bool:
        generator = torch.Generator().manual_seed(0)
        # More queries than the kernel takes at a time, a block that is not whole.
        query, output, key, value = (
            torch.randn(1, 2, tokens, 32, generator=generator, dtype=torch.float32) for tokens in (70, 70, 150, 150)
        )
        order = torch.stack([torch.randperm(150, generator=generator) for _ in range(2)])
        # Queries and weights are rounded to the dtype of the keys, and logits are as large as 10.
        for tail, (dtype, tolerance) in itertools.product(
            (False, True), ((torch.float32, 1e-2), (torch.float16, 1e-1))
        ):
            tensors = query, output, key.to(dtype), value.to(dtype)
            expected = _block_impacts(*tensors, 32, 0.5, tail, order, None)
            options = {"scale": 0.5, "tail": tail, "order": order.to(device)}
            actual = kernels.block_impacts(*(x.to(device) for x in tensors), 32, **options)
            if not torch.allclose(actual.cpu(), expected, 0.0, tolerance):
                return False
        return True

    return kernels_on(device, "block_impacts_triton", "what skipping a key block does", check)

"""What skipping a key block would do to the output of a query, for a few queries against all blocks: in one pass."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.block_mask import num_blocks
from diffsparse.kernels.first_use import kernels_on
from diffsparse.kernels.reorder import in_order
from diffsparse.strategies.planning_memory import slices


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
    if (kernels := _kernels(key.device)) is not None:
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
    """The specification of `block_impacts`, a few heads at a time."""
    batch, heads, tokens, dim = key.shape
    rows = query.shape[2]
    # float32 scores and weights; keys and values in another order and as float32; what each block moves.
    bytes_a_head = 4 * batch * (tokens * (2 * rows + 4 * dim) + 2 * num_blocks(tokens, block_size) * rows * dim)
    parts = []
    for some in slices(heads, bytes_a_head):
        of_some = order if order is None or len(order) == 1 else order[some]
        keys, values = (in_order(x[:, some], of_some) for x in (key, value))
        parts.append(_of_some(query[:, some], output[:, some], keys, values, block_size, scale, tail, key_length))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _of_some(
    query: Tensor,
    output: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    scale: float,
    tail: bool,
    key_length: Tensor | None,
) -> Tensor:
    tokens = key.shape[2]
    blocks = num_blocks(tokens, block_size)
    places = torch.arange(blocks * block_size, device=key.device).view(blocks, block_size)
    end = torch.full_like(places[:1, 0], tokens) if key_length is None else key_length.clamp(max=tokens)
    exists = (places < end[:, None, None])[:, None, :, :, None]  # [B|1, 1, K, block_size, 1]
    padding = (0, 0, 0, blocks * block_size - tokens)
    values = F.pad(value.float(), padding).unflatten(2, (blocks, block_size))
    scores = F.pad(key.float() @ (query * scale).mT, padding).unflatten(2, (blocks, block_size))  # [B, H, K, size, R]
    sizes = exists.sum(3, keepdim=True).clamp_min(1)
    means = (scores * exists).sum(3, keepdim=True) / sizes  # [B, H, K, 1, R], of the mean key
    scores = scores.masked_fill(~exists, -torch.inf)
    peaks = scores.amax(3, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = (scores - peaks).exp_()
    if tail:
        weights -= torch.where(exists, (means - peaks).exp_(), 0.0)
    moves = weights.mT @ values - weights.sum(3)[..., None] * output[:, :, None]  # [B, H, K, R, D]
    return (2 * peaks[:, :, :, 0] + moves.square().sum(-1).log()).mT


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
        tensors = query, output, key, value
        for tail in (False, True):
            expected = _block_impacts(*tensors, 32, 0.5, tail, order, None)
            actual = kernels.block_impacts(
                *(x.to(device) for x in tensors), 32, scale=0.5, tail=tail, order=order.to(device)
            )
            if not torch.allclose(actual.cpu(), expected, 1e-2, 1e-1):
                return False
        return True

    return kernels_on(device, "block_impacts_triton", "what skipping a key block does", check)

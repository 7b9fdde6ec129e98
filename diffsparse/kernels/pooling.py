"""Block means of keys and values: what a skipped block is replaced by in the pooled tail."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from diffsparse.kernels.first_use import kernels_on
from diffsparse.kernels.reorder import in_order

LARGEST_BLOCK = 1024
"""Tokens of a block up to which a GPU's kernel takes the mean: larger ones are too few to occupy it, a program each."""


def block_means(
    x: Tensor, block_size: int, key_length: Tensor | None = None, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean of every block of x [B, H, S, D] as [B, H, K, D] fp32, and how many tokens it is over, [B|1, K] int64.

    Blocks are of the tokens in the `order` [H|1, S] int64, or in their own. The last one may be ragged. Tokens at or
    beyond the place `key_length` [B] are left out, whatever they hold; a block without any token left has mean 0 and
    count 0. No gradient goes through. Nothing is synchronised with the host.
    """
    x = x.detach()
    if block_size > LARGEST_BLOCK or x.stride(3) != 1 or (kernels := _means_kernels(x.device)) is None:
        return _block_means(x, block_size, key_length, order)
    means, token_counts = kernels.block_means(x, block_size, key_length, order)
    return means, token_counts


def _block_means(
    x: Tensor, block_size: int, key_length: Tensor | None, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The specification of `block_means`."""
    x = in_order(x, order)
    batch, heads, num_tokens, head_dim = x.shape
    token_counts = block_token_counts(num_tokens, block_size, key_length, x.device)
    if key_length is not None:
        beyond = torch.arange(num_tokens, device=x.device) >= key_length.to(x.device)[:, None]
        x = x.masked_fill(beyond[:, None, :, None], 0)
    num_whole = num_tokens // block_size
    sums = x.new_empty((batch, heads, token_counts.shape[1], head_dim), dtype=torch.float32)
    whole = x[:, :, : num_whole * block_size].unflatten(2, (num_whole, block_size))
    torch.sum(whole, dim=3, dtype=torch.float32, out=sums[:, :, :num_whole])
    if num_whole < sums.shape[2]:
        torch.sum(x[:, :, num_whole * block_size :], dim=2, dtype=torch.float32, out=sums[:, :, num_whole])
    return sums.div_(token_counts.clamp(min=1)[:, None, :, None]), token_counts


@functools.cache
def _means_kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernel for `block_means`, where it runs and is right on a small input; None elsewhere."""

    def check(kernels: ModuleType) -> bool:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((2, 70, 2, 200), generator=generator, dtype=torch.float32).transpose(1, 2)
        order = torch.stack([torch.randperm(70, generator=generator) for _ in range(2)])
        # More tokens a block than the kernel takes at a time, the last block ragged; a block without tokens.
        key_length = torch.tensor([70, 37], dtype=torch.int32)
        expected = _block_means(x, 40, key_length, order)
        actual = kernels.block_means(x.to(device), 40, key_length.to(device), order.to(device))
        return all(torch.allclose(a.cpu(), e, 1e-5, 1e-5) for a, e in zip(actual, expected, strict=True))

    return kernels_on(device, "block_means_triton", "means of blocks", check)


def block_token_counts(
    num_tokens: int, block_size: int, key_length: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """How many tokens of each block exist, [B|1, K] int64: fewer in a ragged last block and beyond `key_length` [B]."""
    device = device if key_length is None else key_length.device
    starts = torch.arange(0, num_tokens, block_size, device=device)
    if key_length is None:
        return (num_tokens - starts).clamp(max=block_size)[None]
    return (key_length.long().clamp(max=num_tokens)[:, None] - starts).clamp(min=0, max=block_size)


def tail_logs(
    key_blocks: Tensor,
    counts: Tensor,
    num_keys: int,
    key_block_size: int,
    key_length: Tensor | None,
    num_padded: int,
) -> Tensor:
    """The log2 of how many tokens each mean stands for, by which its logit is larger: [B, H, Q, num_padded] fp32.

    -inf where a block is listed, or is none. A kernel would take longer to find it than to multiply by the mean.
    `key_blocks` [B, H, Q, C], `counts` [B, H, Q]. `num_padded` is above the number of blocks: entries beyond a count
    go to the last place, which belongs to no block.
    """
    kernels = _kernels(key_blocks.device)
    compute = _tail_logs if kernels is None else kernels.tail_logs
    logs: Tensor = compute(key_blocks, counts, num_keys, key_block_size, key_length, num_padded)
    return logs


def _tail_logs(
    key_blocks: Tensor,
    counts: Tensor,
    num_keys: int,
    key_block_size: int,
    key_length: Tensor | None,
    num_padded: int,
) -> Tensor:
    """The specification of `tail_logs`."""
    sizes = block_token_counts(num_keys, key_block_size, key_length, key_blocks.device)
    logs = F.pad(sizes, (0, num_padded - sizes.shape[1])).float().log2()
    is_listed = torch.arange(key_blocks.shape[-1], device=counts.device) < counts[..., None]
    index = key_blocks.where(is_listed, num_padded - 1).long()
    return logs[:, None, None].repeat(len(counts) // len(logs), *counts.shape[1:], 1).scatter_(-1, index, -torch.inf)


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernel for `tail_logs`, where it runs and is right on a few lists; None elsewhere."""

    def check(kernels: ModuleType) -> bool:
        generator = torch.Generator().manual_seed(0)
        # More blocks than the kernel takes at a time, the last one ragged.
        key_blocks = torch.rand((2, 2, 3, 1100), generator=generator, device="cpu").argsort(-1).int()
        counts = torch.randint(1, 1101, (2, 2, 3), generator=generator, dtype=torch.int32, device="cpu")
        key_length = torch.tensor([17590, 9000], dtype=torch.int32, device="cpu")
        expected = _tail_logs(key_blocks, counts, 17590, 16, key_length, 1152)
        key_blocks, counts, key_length = (x.to(device) for x in (key_blocks, counts, key_length))
        actual = kernels.tail_logs(key_blocks, counts, 17590, 16, key_length, 1152)
        return torch.allclose(actual.cpu(), expected, 0.0, 1e-6)

    return kernels_on(device, "lists_triton", "sizes of the pooled tail", check)

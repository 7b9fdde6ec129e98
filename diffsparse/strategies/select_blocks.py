"""A number of key blocks for each head, those with the highest scores, as a block mask: on a GPU in one pass."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from diffsparse.block_mask import BlockMask
from diffsparse.kernels.first_use import kernels_on


def select_blocks(
    scores: Tensor, counts: Tensor, always: Tensor, num_tokens: int, query_block_size: int, key_block_size: int
) -> BlockMask:
    """Each query block sees as many key blocks as its head wants, those of `always` first, then the highest scores.

    A row where `always` names more keeps them all. Of equal scores the first block comes first. NaN counts as infinite.

    Args:
        scores: [B|1, H|1, Q, K] float32.
        counts: [H] integers, how many blocks each head wants; less than 1 counts as 1, more than K as K.
        always: [Q, K] bool.
        num_tokens, query_block_size, key_block_size: as `BlockMask` has them.
    """
    sizes = num_tokens, query_block_size, key_block_size
    kernels = _kernels(scores.device)
    if kernels is None:
        return BlockMask.from_visible(_visible(scores, counts, always), *sizes)
    bits, num_seen = kernels.select_blocks(scores, counts, always)
    return BlockMask(bits, num_seen, *sizes)


def _visible(scores: Tensor, counts: Tensor, always: Tensor) -> Tensor:
    """The specification of `select_blocks`, as a boolean block map [B|1, H, Q, K]."""
    # NaN comes before infinity where the highest are first.
    scores = scores.masked_fill(scores.isnan(), torch.inf).masked_fill_(always, torch.nan)
    blocks = scores.argsort(dim=-1, descending=True, stable=True).expand(-1, len(counts), -1, -1)
    is_wanted = torch.arange(blocks.shape[-1], device=counts.device) < counts.clamp(min=1)[:, None, None]  # [H, 1, K]
    visible = torch.empty_like(blocks, dtype=torch.bool)
    return visible.scatter_(-1, blocks, is_wanted.expand_as(blocks)).logical_or_(always)


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernel for `select_blocks`, where it runs and is right on a small input; None elsewhere."""

    def check(kernels: ModuleType) -> bool:
        generator = torch.Generator().manual_seed(0)
        # More blocks than the kernel takes at a time; equal scores, and both zeros.
        scores = torch.randn((1, 3, 2, 600), generator=generator, dtype=torch.float32).mul_(8).round_().div_(8)
        always = torch.rand((2, 600), generator=generator) < 0.05
        counts = torch.tensor([1, 200, 600])
        expected = BlockMask.from_visible(_visible(scores, counts, always), 1200, 600, 2)
        actual = kernels.select_blocks(scores.to(device), counts.to(device), always.to(device))
        return all(torch.equal(a.cpu(), e) for a, e in zip(actual, (expected.bits, expected.counts), strict=True))

    return kernels_on(device, "selection_triton", "choosing key blocks", check)

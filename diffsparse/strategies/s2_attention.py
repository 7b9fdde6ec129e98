"""S2-Attention (arXiv:2407.17678): every head sees its neighbourhood and a shard of the rest of its own."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_layout import block_layout
from diffsparse.strategies.option_checks import check_block_sizes, check_integers
from diffsparse.strategies.strategy import AttentionCall


@dataclass(frozen=True)
class S2Attention:
    """A static mask: the nearest blocks, and every `stride`-th block beyond, at an offset of its own for each head.

    The offsets spread the shards evenly over the heads, so that `stride` neighbouring heads see everything between
    them. The released causal rule is used in both directions; the released rule for both directions has the same shard
    for all heads. Models are meant to be trained with it: without training it is a baseline. The density is about
    1 / stride and the neighbourhood.

    Args:
        local_blocks: key blocks from its own place on, to either side, that a query block sees; 1 for its own alone.
        stride: of the blocks of a shard.
        block_size: tokens a block, of queries and of keys.

    Raises:
        ValueError: an option that is not a positive integer.
    """

    local_blocks: int = 8
    stride: int = 8
    block_size: int = 64

    def __post_init__(self) -> None:
        check_integers(1, local_blocks=self.local_blocks, stride=self.stride)
        check_block_sizes(block_size=self.block_size)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        return _plan(call.grid, query.shape[1], self, query.device)


@functools.lru_cache(maxsize=16)
def _plan(grid: TokenGrid, heads: int, options: S2Attention, device: torch.device) -> AttentionPlan:
    layout = block_layout(grid, options.block_size, options.block_size, device)
    place = torch.arange(len(layout.always), device=device)
    is_near = (place[:, None] - place).abs() < options.local_blocks  # [Q, K]
    offset = torch.arange(heads, device=device) * max(1, options.stride // heads)
    is_in_shard = (place + offset[:, None]) % options.stride == 0  # [H, K]
    return layout.plan((is_in_shard[:, None] | is_near | layout.always)[None])

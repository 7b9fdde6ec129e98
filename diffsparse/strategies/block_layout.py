"""One token order for all heads of a layer, cut into blocks: where the methods without head classes work."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.block_mask import BlockMask, num_blocks
from diffsparse.grid import TokenGrid
from diffsparse.permutation import Permutation, axis_order, hilbert_order, tile_order
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.always_exact import exact_blocks, first_exact_place, first_frame_last


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """What depends on the grid and a few options alone.

    Attributes:
        permutation: the order of the tokens, text last; None where it is the tokens' own.
        always: [Q, K] bool, what is exact whatever the strategy.
        free_queries, free_keys: how many query and key blocks, from the first, hold neither text nor, where that is
            exact, the first frame.
        num_tokens: S.
        query_block_size, key_block_size: tokens a block.
    """

    permutation: Permutation | None
    always: Tensor
    free_queries: int
    free_keys: int
    num_tokens: int
    query_block_size: int
    key_block_size: int

    def ordered(self, x: Tensor) -> Tensor:
        """The tokens of x [B, H, S, D] in this order."""
        return x if self.permutation is None else self.permutation.apply(x)

    def plan(self, visible: Tensor, lasts: bool = False) -> AttentionPlan:
        """The plan of a block map [B|1, H|1, Q, K]; `lasts` as the plan's."""
        mask = BlockMask.from_visible(visible, self.num_tokens, self.query_block_size, self.key_block_size)
        return AttentionPlan(self.permutation, mask, lasts=lasts)


@functools.lru_cache(maxsize=32)
def block_layout(
    grid: TokenGrid,
    query_block_size: int,
    key_block_size: int,
    device: torch.device,
    *,
    tile: tuple[int, int, int] | None = None,
    hilbert: bool = False,
    first_frame: bool = False,
) -> BlockLayout:
    """The layout of a grid in frame-major order, by tiles of `tile` tokens (frames, height, width), or along a curve.

    `hilbert` asks for the curve. `first_frame` makes the first frame exact too, and moves it between the other frames
    and the text. Made once for each set of arguments.
    """
    if hilbert:
        order = hilbert_order(grid)
    else:
        order = axis_order(grid, ("frame", "height", "width")) if tile is None else tile_order(grid, tile)
    if first_frame:
        order = first_frame_last(grid, order)
    always = exact_blocks(
        grid, query_block_size, key_block_size, first_frame_queries=first_frame, first_frame_keys=first_frame
    )
    is_own_order = torch.equal(order, torch.arange(grid.num_tokens))
    place = first_exact_place(grid, first_frame)
    free_queries, free_keys = (
        num_blocks(place, size) if place == grid.num_tokens else place // size
        for size in (query_block_size, key_block_size)
    )
    return BlockLayout(
        permutation=None if is_own_order else Permutation(order[None].to(device)),
        always=always.to(device),
        free_queries=free_queries,
        free_keys=free_keys,
        num_tokens=grid.num_tokens,
        query_block_size=query_block_size,
        key_block_size=key_block_size,
    )

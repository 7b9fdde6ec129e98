"""Sliding tile attention (arXiv:2502.04507): each tile of the video sees a window of tiles around it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_layout import block_layout
from diffsparse.strategies.option_checks import check_block_sizes, check_sides
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.tile_windows import blocks_of_windows


@dataclass(frozen=True)
class SlidingTile:
    """The queries of a tile see the tiles of a window centred on it, pushed inwards at the border of the grid.

    So every tile sees as many tiles as any other, unless the grid itself is smaller than the window. The tokens are
    ordered by tile. A query block sees every key block that shares a tile pair with it: where the tiles are whole
    blocks, as 6 x 8 x 8 tokens are three blocks of 128, nothing else is seen; elsewhere blocks straddle tiles, and
    what a query block sees grows by at most one tile row of its own and a key block at each end of a run of tiles.
    Tiles at the far sides of a grid may be smaller, so any grid will do.

    One window serves all heads, layers and steps. The paper searches one for each of them offline, over 16 prompts,
    among windows like (5, 6, 1) and (1, 6, 10) tiles; the default here is that of its fine-tuned model, 9 % of a grid
    of 30 x 48 x 80.

    Args:
        tile: frames, height, width of a tile, in tokens.
        window: frames, height, width of the window, in tiles.
        query_block_size, key_block_size: tokens a block.

    Raises:
        ValueError: an option that is not positive.
    """

    tile: tuple[int, int, int] = (6, 8, 8)
    window: tuple[int, int, int] = (3, 3, 3)
    query_block_size: int = 128
    key_block_size: int = 128

    def __post_init__(self) -> None:
        check_sides("tile", self.tile, (6, 8, 8))
        check_sides("window", self.window, (3, 3, 3))
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        return _plan(call.grid, self, query.device)


@functools.lru_cache(maxsize=16)
def _plan(grid: TokenGrid, options: SlidingTile, device: torch.device) -> AttentionPlan:
    blocks = options.query_block_size, options.key_block_size
    layout = block_layout(grid, *blocks, device, tile=options.tile)
    visible = blocks_of_windows(grid, options.tile, options.window, *blocks, moved_inwards=True).to(device)
    return layout.plan((visible | layout.always)[None, None])

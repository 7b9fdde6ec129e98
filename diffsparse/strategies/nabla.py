"""NABLA (arXiv:2507.13546): the fewest blocks that hold a share of the pooled softmax, and a window around each."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_layout import BlockLayout, block_layout
from diffsparse.strategies.option_checks import check_block_sizes, check_shares, check_sides
from diffsparse.strategies.pooled_scores import pooled_scores
from diffsparse.strategies.smallest_set import smallest_set
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.tile_windows import blocks_of_windows


@dataclass(frozen=True)
class NABLA:
    """Each query block sees the fewest key blocks whose pooled softmax reaches `mass`, and those of a window.

    The tokens of a frame are ordered by patches, 8 x 8 as published, which are blocks then. The window is one of
    patches around each patch, cut off at the border of the grid. What it holds comes on top of the share.

    It is what Kandinsky 5 has for its longer videos (there the model brings it itself), and `mass` and `window` are
    those of its `config_10s_sft.yaml`; diffusers' upscaler of Kandinsky 6 has 0.8 and (11, 7, 7). That takes grids
    whose sides 8 divides. Any grid will do here: patches at the far sides are smaller, and blocks straddle them.

    Args:
        mass: share of the pooled softmax that the key blocks of a query block must reach, 0–1.
        window: frames, height, width of the window, in patches; None for none.
        patch: height and width of a patch, in tokens.
        query_block_size, key_block_size: tokens a block.

    Raises:
        ValueError: an option out of its range.
    """

    mass: float = 0.9
    window: tuple[int, int, int] | None = (11, 3, 3)
    patch: tuple[int, int] = (8, 8)
    query_block_size: int = 64
    key_block_size: int = 64

    def __post_init__(self) -> None:
        check_shares(mass=self.mass)
        if self.window is not None:
            check_sides("window", self.window, (11, 3, 3))
        check_sides("patch", self.patch, (8, 8))
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        layout, fixed = _layout(call.grid, self, query.device)
        blocks = self.query_block_size, self.key_block_size
        scores = pooled_scores(
            layout.ordered(query), layout.ordered(key), *blocks, key_length=call.key_length, scale=call.scale
        )
        return layout.plan(smallest_set(scores.softmax(-1), self.mass) | fixed)


@functools.lru_cache(maxsize=16)
def _layout(grid: TokenGrid, options: NABLA, device: torch.device) -> tuple[BlockLayout, Tensor]:
    """The layout, and what is seen whatever the scores: [Q, K] bool."""
    blocks, tile = (options.query_block_size, options.key_block_size), (1, *options.patch)
    layout = block_layout(grid, *blocks, device, tile=tile)
    if options.window is None:
        return layout, layout.always
    window = blocks_of_windows(grid, tile, options.window, *blocks, moved_inwards=False)
    return layout, layout.always | window.to(device)

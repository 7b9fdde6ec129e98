"""Jenga (arXiv:2505.16864): pooled scores along a Hilbert curve, and the blocks that touch a query block's own."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.block_mask import num_blocks
from diffsparse.grid import TokenGrid
from diffsparse.permutation import hilbert_order
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_layout import BlockLayout, block_layout
from diffsparse.strategies.option_checks import check_block_sizes, check_bools, check_density, check_shares
from diffsparse.strategies.pooled_scores import pooled_scores
from diffsparse.strategies.smallest_set import smallest_set
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.top_blocks import top_blocks


@dataclass(frozen=True)
class Jenga:
    """Each query block sees the key blocks with the highest pooled scores, and those that touch it in the video.

    Tokens are ordered along a Hilbert curve through frames, rows and columns, so that a block is a lump of the video.
    A query block sees as many key blocks as `density` says, or more, if it takes more to hold `mass` of the pooled
    softmax. Blocks in which a token has one of its 26 neighbours come on top.

    This is the paper's attention carving, with the released curve for HunyuanVideo, but for what the curve does where
    the grid is no power of two: the released one winds through the grid itself, this one through the cube around it.
    For Wan the released code has a curve for each frame. Its smaller resolution in the first steps, with a bias for
    text, is no matter of attention and left out. `density` and `mass` are those of its `Base` setting for HunyuanVideo
    in the first stage; the second has a density of 0.15, that for Wan 2.1 14B a mass of 0.8.

    Args:
        density: share of the key blocks that a query block sees at least for their scores, 0–1.
        mass: share of the pooled softmax that they must reach, 0–1.
        neighbours: whether blocks that touch are seen.
        query_block_size, key_block_size: tokens a block.

    Raises:
        ValueError: an option out of its range.
    """

    density: float = 0.25
    mass: float = 0.3
    neighbours: bool = True
    query_block_size: int = 128
    key_block_size: int = 128

    def __post_init__(self) -> None:
        check_density(self.density)
        check_shares(mass=self.mass)
        check_bools(neighbours=self.neighbours)
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        layout, fixed = _layout(call.grid, self, query.device)
        sizes = self.query_block_size, self.key_block_size
        scores = pooled_scores(layout.ordered(query), layout.ordered(key), *sizes, scale=call.scale)
        # Text is seen anyhow, and takes no part, padded or not.
        scores[..., layout.free_keys :] = -torch.inf
        mass = scores.softmax(-1)
        return layout.plan(top_blocks(mass, int(self.density * mass.shape[-1])) | smallest_set(mass, self.mass) | fixed)


@functools.lru_cache(maxsize=16)
def _layout(grid: TokenGrid, options: Jenga, device: torch.device) -> tuple[BlockLayout, Tensor]:
    """The layout, and what is seen whatever the scores: [Q, K] bool."""
    blocks = options.query_block_size, options.key_block_size
    layout = block_layout(grid, *blocks, device, hilbert=True)
    if not options.neighbours:
        return layout, layout.always
    return layout, layout.always | touching_blocks(grid, hilbert_order(grid), *blocks).to(device)


def touching_blocks(grid: TokenGrid, order: Tensor, query_block_size: int, key_block_size: int) -> Tensor:
    """The pairs of blocks that hold a token of the video and one of its 26 neighbours: [Q, K] bool.

    Blocks are cut from the order [S], which has its text last.
    """
    sizes = (grid.frames, grid.height, grid.width)
    place = order.argsort()[grid.text_before : grid.text_before + grid.num_video_tokens].view(sizes)
    blocks = [num_blocks(grid.num_tokens, size) for size in (query_block_size, key_block_size)]
    touching = torch.zeros(blocks, dtype=torch.bool)
    for steps in itertools.product((-1, 0, 1), repeat=3):
        here, there = (
            place[tuple(slice(max(0, sign * step), size + min(0, sign * step)) for step, size in zip(steps, sizes))]
            for sign in (1, -1)
        )
        touching[here.flatten() // query_block_size, there.flatten() // key_block_size] = True
    return touching

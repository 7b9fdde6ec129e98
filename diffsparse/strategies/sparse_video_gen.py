"""Sparse VideoGen: a band through space or a band through time, whichever costs a head less."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.heads import HeadClass
from diffsparse.permutation import axis_order
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.always_exact import exact_blocks
from diffsparse.strategies.bands import band, band_with_first_frame_moved, half_width_beside_text
from diffsparse.strategies.fixed_masks import FixedMasks, sampled_rows
from diffsparse.strategies.option_checks import check_block_sizes, check_bools, check_density, check_sampling
from diffsparse.strategies.strategy import AttentionCall

AXES = {HeadClass.SPATIAL: ("frame", "height", "width"), HeadClass.TEMPORAL: ("height", "width", "frame")}


@dataclass(frozen=True)
class SparseVideoGen:
    """Each head sees a band of tokens, in frame-major order (spatial) or in token-major order (temporal).

    Sparse VideoGen, arXiv:2502.01776, algorithm 1: the mask with the smaller error of the output on a few sampled
    query rows is the head's. Text sees all and is seen by all.

    Where the published code and this differ: the mask that is judged is the one that is executed (there a narrower
    one), sampled rows are of the video, one in each of equal stretches, seeded, and all of it (there uniform over the
    first 10,000 tokens); a head has one class for the whole batch; the first frame is the first frame in both
    orders, moved to the text's side (there the first places of either order); the band is as wide as the density
    says, in whole blocks by their centres (there in multiples of 128 tokens).

    Args:
        density: share of the pairs of tokens that the band and the text keep, 0–1. The published settings are 0.30 for
            Wan and 0.25 for HunyuanVideo and CogVideoX. Text alone may take more than that; the band is then a block.
        first_frame: whether the keys of the first frame are seen by all, on top of `density`: as published for Wan,
            where 0.30 becomes 0.34. Its queries have their band. An image has no first frame.
        sampled_rows: query rows a head that are computed exactly to judge both masks.
        query_block_size, key_block_size: tokens a block.
        seed: of the sampled rows.

    Raises:
        ValueError: an option out of its range.
    """

    density: float = 0.25
    first_frame: bool = True
    sampled_rows: int = 64
    query_block_size: int = 64
    key_block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        check_bools(first_frame=self.first_frame)
        check_sampling(self.sampled_rows, self.seed)
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        masks = self.masks(call.grid, query.device)
        rows = sampled_rows(call.grid, self.sampled_rows, self.seed, query.device)
        classes = masks.errors(query, key, value, rows, call).argmin(0)  # the masks stand in the order of HeadClass
        return masks.plan(classes, classes)

    def masks(self, grid: TokenGrid, device: torch.device | str = "cpu") -> FixedMasks:
        """The spatial mask and the temporal mask of a grid."""
        return _masks(grid, self, torch.device(device))


@functools.lru_cache(maxsize=16)
def _masks(grid: TokenGrid, options: SparseVideoGen, device: torch.device) -> FixedMasks:
    sizes = (options.query_block_size, options.key_block_size)
    width = half_width_beside_text(options.density, grid)
    exact = exact_blocks(grid, *sizes, first_frame_keys=options.first_frame)
    orders, masks = [], []
    for number, axes in enumerate(AXES.values()):
        order = axis_order(grid, axes)
        if options.first_frame:
            order, near = band_with_first_frame_moved(grid, order, width, *sizes)
        else:
            places = torch.arange(grid.num_tokens)
            near = band(places, places, width, *sizes)
        orders.append(order)
        masks.append((number, near | exact))
    return FixedMasks.of(torch.stack(orders), masks, *sizes, device)

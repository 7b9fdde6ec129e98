"""MMInference (arXiv:2504.16083): grid heads, whose lattice a permutation turns into a band of blocks."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.permutation import axis_order
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.always_exact import block_distance, exact_blocks
from diffsparse.strategies.fixed_masks import FixedMasks, sampled_rows
from diffsparse.strategies.option_checks import check_block_sizes, check_density, check_integers, check_sampling
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.top_blocks import top_blocks


@dataclass(frozen=True)
class MMInference:
    """Each head sees the keys on a lattice around the query, of the stride that costs it least.

    Locality in a video is a lattice in the sequence: the same column of other rows is `width` tokens away, the same
    place of other frames `height * width`. Sorted by their place modulo the stride, the tokens of one phase stand
    side by side, and the lattice is a band of blocks: a query block sees its own phase and as many neighbouring ones
    as the budget allows, or as much of its phase as it allows. Stride 1 is the band of the sequence itself.

    The paper searches stride and phase of each head online, by a procedure that it leaves to its code, which has not
    been released; here each head takes the stride with the least output error of the executed mask on sampled queries,
    and its phase is its own. The patterns at the borders of modalities are the exact text of every strategy; the
    A-shape and vertical-slash patterns are `MInference`. The permutation is done before the kernel, not in it.

    Args:
        density: share of the key blocks that a query block sees, 0–1.
        strides: to choose from, in tokens; None for 1, the grid's width and its height times width.
        sampled_rows: queries a head that are computed exactly.
        query_block_size, key_block_size: tokens a block.
        seed: of the sampled rows.

    Raises:
        ValueError: an option out of its range.
    """

    density: float = 0.25
    strides: tuple[int, ...] | None = None
    sampled_rows: int = 64
    query_block_size: int = 64
    key_block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        if self.strides is not None and not (isinstance(self.strides, tuple) and self.strides):
            raise ValueError(
                f"`strides` must be a tuple of tokens, like (1, 80, 3600), got {self.strides!r}. "
                f"For those of each grid say None."
            )
        for stride in self.strides or ():
            check_integers(1, strides=stride)
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)
        check_sampling(self.sampled_rows, self.seed)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        masks = _masks(call.grid, self, query.device)
        rows = sampled_rows(call.grid, self.sampled_rows, self.seed, query.device)
        return masks.plan(masks.errors(query, key, value, rows, call).argmin(0))


@functools.lru_cache(maxsize=16)
def _masks(grid: TokenGrid, options: MMInference, device: torch.device) -> FixedMasks:
    sizes = options.query_block_size, options.key_block_size
    strides = options.strides or (1, grid.width, grid.height * grid.width)
    orders = torch.stack([_lattice_order(grid, stride) for stride in strides])
    distance = block_distance(grid.num_tokens, *sizes)
    budget = max(1, round(options.density * distance.shape[1]))
    band = top_blocks(-distance, budget, exact_blocks(grid, *sizes))
    return FixedMasks.of(orders, [(number, band) for number in range(len(strides))], *sizes, device)


def _lattice_order(grid: TokenGrid, stride: int) -> Tensor:
    """The video's tokens by their place modulo `stride`, each phase in the order of the sequence, text last: [S]."""
    order = axis_order(grid, ("frame", "height", "width"))
    video = order[: grid.num_video_tokens]
    by_phase = torch.argsort(torch.arange(len(video)) % stride, stable=True)
    return torch.cat([video[by_phase], order[grid.num_video_tokens :]])

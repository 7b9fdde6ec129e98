"""Sparse-vDiT: dense, skipped, a band in one of two orders, or stripes, by error and density together."""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.block_mask import num_blocks
from diffsparse.grid import TokenGrid
from diffsparse.permutation import axis_order
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.always_exact import exact_blocks
from diffsparse.strategies.bands import band, half_width_beside_text
from diffsparse.strategies.fixed_masks import FixedMasks, sampled_rows
from diffsparse.strategies.option_checks import (
    check_block_sizes,
    check_bools,
    check_density,
    check_number,
    check_sampling,
)
from diffsparse.strategies.strategy import AttentionCall


class Mode(enum.IntEnum):
    """What a head computes."""

    DENSE = 0
    """Everything."""
    SKIP = 1
    """Nothing: its output is 0."""
    DIAGONAL = 2
    """A band in frame-major order: around its own place in its own frame."""
    MULTI_DIAGONAL = 3
    """A band in token-major order: around its own place in every frame."""
    VERTICAL_STRIPE = 4
    """The same keys for all queries."""


@dataclass(frozen=True)
class SparseVDiT:
    """Each head gets the mode with the smallest sum of its error and its density, or stays dense.

    Sparse-vDiT, arXiv:2506.03065. Of the modes but dense, L = mean squared error of the output + `weight` x density;
    the smallest L wins, unless it is above `largest`: then the head stays dense. Text sees all and is seen by all,
    but for skipped heads.

    The paper searches offline with a few samples, for every layer, head and step, and has released no code. Here the
    layer's own queries, keys and values decide on sampled rows when it is planned, for the whole batch: at every step
    with `replan_every=1`. It says neither how wide the bands are nor where the stripes lie: here all three have the
    same `density`, the executed one counts in L, and the stripes are blocks at equal distances, with the first frame
    where `first_frame`. Its error has the scale of the model's values, so that `largest` has to be found anew for
    every model, and heads with small values are skipped; `relative` mends that.

    Args:
        density: share of the pairs of tokens that a band or the stripes keep, text included, 0–1. Text and the first
            frame alone may take more than that.
        weight: of the density against the error, λ in the paper.
        largest: of error and density together, for a head not to stay dense; ε in the paper.
        relative: whether the error is divided by the mean square of the head's exact output.
        first_frame: whether the stripes hold the first frame. An image has none.
        sampled_rows: query rows a head that are computed exactly to judge the modes.
        query_block_size, key_block_size: tokens a block.
        seed: of the sampled rows.

    Raises:
        ValueError: an option out of its range.
    """

    density: float = 0.25
    weight: float = 0.5
    largest: float = 1.0
    relative: bool = False
    first_frame: bool = True
    sampled_rows: int = 64
    query_block_size: int = 64
    key_block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        check_number("weight", self.weight, 0, float("inf"))
        check_number("largest", self.largest, 0, float("inf"))
        check_bools(relative=self.relative, first_frame=self.first_frame)
        check_sampling(self.sampled_rows, self.seed)
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        masks = self.masks(call.grid, query.device)
        rows = sampled_rows(call.grid, self.sampled_rows, self.seed, query.device)
        errors = []
        for pairs in masks.outputs(query, key, value, rows, call):
            exact = pairs[Mode.DENSE][1]
            pairs[Mode.SKIP] = (torch.zeros_like(exact), exact)
            errors.append(torch.stack([self._error(*pair) for pair in pairs]))
        # The mask keeps its own, and the masks of a grid are kept.
        density = masks.mask.density.clone()
        density[Mode.SKIP] = 0.0
        losses = torch.cat(errors, dim=1) + self.weight * density[:, None]  # [modes, H]
        smallest, mode = losses[Mode.SKIP :].min(0)
        modes = torch.where(smallest > self.largest, int(Mode.DENSE), mode + Mode.SKIP)
        return masks.plan(modes, skipped=modes == Mode.SKIP)

    def masks(self, grid: TokenGrid, device: torch.device | str = "cpu") -> FixedMasks:
        """The masks of a grid in the order of `Mode`. Skipped heads compute one block a row, for nothing."""
        return _masks(grid, self, torch.device(device))

    def _error(self, output: Tensor, exact: Tensor) -> Tensor:
        """Mean squared error of the outputs [B, H, R, D], by head: [H]. NaN counts as infinite."""
        error = (output - exact).square().mean((0, 2, 3)).nan_to_num(nan=torch.inf)
        return error / exact.square().mean((0, 2, 3)).clamp(min=1e-12) if self.relative else error


@functools.lru_cache(maxsize=16)
def _masks(grid: TokenGrid, options: SparseVDiT, device: torch.device) -> FixedMasks:
    sizes = (options.query_block_size, options.key_block_size)
    axes = (("frame", "height", "width"), ("height", "width", "frame"))
    orders = torch.stack([axis_order(grid, each) for each in axes])
    places = torch.arange(grid.num_tokens)
    exact = exact_blocks(grid, *sizes)
    nothing_but_own_place = exact_blocks(TokenGrid(1, 1, grid.num_tokens), *sizes)
    near = band(places, places, half_width_beside_text(options.density, grid), *sizes) | exact
    masks = {
        Mode.DENSE: (0, torch.ones_like(exact)),
        Mode.SKIP: (0, nothing_but_own_place),
        Mode.DIAGONAL: (0, near),
        Mode.MULTI_DIAGONAL: (1, near),
        Mode.VERTICAL_STRIPE: (0, exact | _stripes(grid, options)),
    }
    return FixedMasks.of(orders, [masks[mode] for mode in Mode], *sizes, device)


def _stripes(grid: TokenGrid, options: SparseVDiT) -> Tensor:
    """The key blocks that all queries see, [K] bool: text, the first frame, and others at equal distances."""
    size = options.key_block_size
    blocks = num_blocks(grid.num_tokens, size)
    stripes = torch.zeros(blocks, dtype=torch.bool)
    if grid.num_tokens > grid.num_video_tokens:
        stripes[grid.num_video_tokens // size :] = True
    if options.first_frame and grid.frames > 1:
        stripes[: num_blocks(grid.height * grid.width, size)] = True
    others = (~stripes).nonzero()[:, 0]
    # Text queries see all, which is not left for the stripes.
    text = 1 - grid.num_video_tokens / grid.num_tokens
    wanted = round((options.density - text) / (1 - text) * blocks) - int(stripes.sum())
    wanted = min(max(wanted, 0), len(others))
    stripes[others[(2 * torch.arange(wanted) + 1) * len(others) // max(1, 2 * wanted)]] = True
    return stripes

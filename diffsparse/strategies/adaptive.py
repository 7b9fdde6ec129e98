"""The default strategy: for each head the order and the mask that its own sampled rows say cost least."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from diffsparse.block_mask import num_blocks
from diffsparse.grid import TokenGrid
from diffsparse.heads import HeadClass
from diffsparse.permutation import Permutation
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.adaptive_geometry import ORDERS, Geometry, geometry_of
from diffsparse.strategies.adaptive_trials import RULES, Inputs, Means, Trial, scores_by
from diffsparse.strategies.error_budget import on_device, share_out
from diffsparse.strategies.option_checks import check_block_sizes, check_bools, check_density, check_sampling, is_number
from diffsparse.strategies.select_blocks import select_blocks
from diffsparse.strategies.strategy import AttentionCall

BLOCK_SIZE = 64
LARGE_QUERY_BLOCK = 128
MANY_TOKENS = 16384
NEGLIGIBLE_ERROR = 1e-4
"""A squared relative error that nobody sees; below it a head keeps its band."""
SHARES = (0.5, 0.75, 1.0, 1.25, 1.5)
"""What a head may get of the mean budget, and where between its error is measured."""


@dataclass(frozen=True)
class Candidate:
    """A token order and a rule for the key blocks that a query block sees in it.

    Attributes:
        head_class: what a head is called for which this is best.
        order: "frame-major", "token-major" (the same place of all frames side by side) or "tiles".
        rule: "band" (the nearest blocks), "impact" (those whose skipping would move the output of the mean query most),
            "top" (the highest products of mean query and mean key) or "random" (a baseline to beat).

    Raises:
        ValueError: an unknown order or rule.
    """

    head_class: HeadClass
    order: str
    rule: str

    def __post_init__(self) -> None:
        for name, known in (("order", ORDERS), ("rule", RULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {known}, got {getattr(self, name)!r}.")


CANDIDATES = (
    Candidate(HeadClass.SPATIAL, "frame-major", "band"),
    Candidate(HeadClass.TEMPORAL, "token-major", "band"),
    Candidate(HeadClass.TEXTURAL, "frame-major", "impact"),
    Candidate(HeadClass.TEXTURAL, "token-major", "impact"),
    Candidate(HeadClass.TEXTURAL, "tiles", "impact"),
)


@dataclass(frozen=True)
class Adaptive:
    """Chooses for each head among a spatial band, a temporal band and content-chosen blocks, by measured error.

    All candidates see the same number of key blocks. The one whose executed mask comes closest to exact attention on
    the sampled rows names the class and the token order of the head. Where the rows say that it helps, what a head
    skips enters its softmax as the pooled mean of each block. Then the layer's blocks are shared out: a head whose
    error falls fast gets up to half as many again, one whose error does not as few as half. The first sparse steps,
    whose errors all later ones build on, get more than the last. Text is always exact: every query sees it, and it sees
    every key.

    Args:
        density: share of the key blocks that a query block sees, 0–1, mean over the heads of a layer and over the
            sparse steps.
        query_block_size, key_block_size: tokens a block; None for 64, but for 128 queries from 16,384 tokens on: that
            is what the Hopper kernel takes, and planning is cheaper.
        tile: frames, height, width of the tiles of the third order, in tokens; None for a cube of 64 tokens, or for
            a square where there is one frame.
        sampled_rows: query rows a head that are computed exactly to judge the candidates.
        band_margin: how much larger the error of a band may be than that of content-chosen blocks for the head to
            keep its band, as a factor. A band's blocks stay right until the next plan, chosen blocks age.
        tail: whether skipped blocks may enter as their mean.
        equal_heads: whether all heads of a layer get the same number of blocks, whatever their error.
        front_load: how much the density changes over the sparse steps, 0–1: it falls evenly from `1 + front_load` times
            `density` to `1 - front_load` times. Less where it would exceed 1; 0 where nothing says how many steps there
            are.
        candidates: what each head chooses from.
        seed: of the sampled rows.

    Raises:
        ValueError: an option out of its range.
    """

    density: float = 0.25
    query_block_size: int | None = None
    key_block_size: int | None = None
    tile: tuple[int, int, int] | None = None
    sampled_rows: int = 64
    band_margin: float = 1.1
    tail: bool = True
    equal_heads: bool = False
    front_load: float = 0.75
    candidates: tuple[Candidate, ...] = CANDIDATES
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        sizes = {"query_block_size": self.query_block_size, "key_block_size": self.key_block_size}
        check_block_sizes(**{name: size for name, size in sizes.items() if size is not None})
        check_sampling(self.sampled_rows, self.seed)
        check_bools(tail=self.tail, equal_heads=self.equal_heads)
        if self.tile is not None and (
            not isinstance(self.tile, tuple)
            or len(self.tile) != 3
            or not all(type(side) is int and side > 0 for side in self.tile)
        ):
            raise ValueError(f"`tile` must be frames, height and width in tokens, like (4, 4, 4), got {self.tile!r}.")
        if (
            not isinstance(self.candidates, tuple)
            or not self.candidates
            or not all(isinstance(each, Candidate) for each in self.candidates)
        ):
            raise ValueError(f"`candidates` must be a tuple of at least one Candidate, got {self.candidates!r}.")
        if not is_number(self.front_load) or not 0 <= self.front_load <= 1:
            raise ValueError(
                f"`front_load` must be from 0 (the same density at each step) to 1, got {self.front_load!r}."
            )
        if not is_number(self.band_margin) or not 1 <= self.band_margin < math.inf:
            raise ValueError(f"`band_margin` must be a number of at least 1, got {self.band_margin!r}.")

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer, each head judged on its own; see `Strategy.plan`."""
        return self._sized(call.grid, call.progress)._plan(query, key, value, call)

    def executed_density(self, grid: TokenGrid) -> float:
        """Share of key blocks computed exactly on this grid, text included, whatever query and key are.

        Mean over the sparse steps.
        """
        layout = _layout(grid, self._sized(grid), torch.device("cpu"))
        return float(((layout.band_rank < layout.budget) | layout.always).float().mean())

    def plan_bytes(self, grid: TokenGrid, num_heads: int) -> int:
        """Bytes of the block mask and its schedule that a layer's plan keeps for a batch of one."""
        sized = self._sized(grid)
        query_blocks, key_blocks = (
            num_blocks(grid.num_tokens, size) for size in (sized.query_block_size, sized.key_block_size)
        )
        return num_heads * query_blocks * (num_blocks(key_blocks, 8) + 8)

    def _sized(self, grid: TokenGrid, progress: float | None = None) -> _Sized:
        """These options with the block sizes for a grid, and the density for this part of the sparse steps."""
        query_block_size = LARGE_QUERY_BLOCK if grid.num_tokens >= MANY_TOKENS else BLOCK_SIZE
        load = 0.0 if progress is None else min(self.front_load, 1 / self.density - 1) * (1 - 2 * progress)
        options = {field.name: getattr(self, field.name) for field in fields(Adaptive)}
        options["density"] = self.density * (1 + load)
        options["query_block_size"] = self.query_block_size or query_block_size
        options["key_block_size"] = self.key_block_size or BLOCK_SIZE
        options["candidates"] = tuple(sorted(self.candidates, key=lambda candidate: ORDERS.index(candidate.order)))
        return _Sized(**options)


@dataclass(frozen=True)
class _Sized(Adaptive):
    """Options that leave no block size open, the candidates of an order side by side."""

    query_block_size: int = 64
    key_block_size: int = 64

    def _plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        layout = _layout(call.grid, self, query.device)
        scale = call.scale_of(query)
        rows = query.index_select(2, layout.rows).float() * scale
        inputs = Inputs(query, key, value, rows, scale, self.tail, call.key_length, self._noise(query, layout))
        by_order = itertools.groupby(self.candidates, key=lambda candidate: candidate.order)
        trials = [
            Trial.of(ORDERS.index(order), [each.rule for each in candidates], layout.counts, inputs, layout)
            for order, candidates in by_order
        ]
        errors, errors_with_tail = torch.cat([trial.errors for trial in trials], dim=2).unbind(1)  # [H, C, N]
        tail = errors_with_tail < errors
        if self.tail:
            errors = torch.minimum(errors, errors_with_tail)
        best = self._best(errors[:, :, layout.counts.index(layout.budget)])
        errors, tail = (x.take_along_dim(best[:, None, None], 1)[:, 0] for x in (errors, tail))  # [H, N]
        counts = share_out(errors * trials[0].sizes[:, None], layout.counts, layout.budget)
        # Where a head's share lies between two that were measured, the tail is that of the smaller.
        share = torch.searchsorted(on_device(tuple(layout.counts), query.device), counts, right=True) - 1
        order = self._of(best, [ORDERS.index(candidate.order) for candidate in self.candidates])
        permutation = Permutation(layout.orders, order)
        scores = self._scores(best, trials, inputs, layout, permutation)
        sizes = call.grid.num_tokens, self.query_block_size, self.key_block_size
        return AttentionPlan(
            permutation,
            select_blocks(scores, counts, layout.always, *sizes),
            tail.gather(1, share[:, None]).T if self.tail else None,
            self._of(best, [candidate.head_class for candidate in self.candidates]),
        )

    def _noise(self, query: Tensor, layout: _Layout) -> Tensor | None:
        """The scores of the rule "random", [B, H, Q, K]; None where no candidate asks for it."""
        if all(candidate.rule != "random" for candidate in self.candidates):
            return None
        generator = torch.Generator(query.device).manual_seed(self.seed)
        return torch.rand((*query.shape[:2], *layout.always.shape), generator=generator, device=query.device)

    def _best(self, errors: Tensor) -> Tensor:
        """Which candidate each head takes, of the errors [H, C]: the first of those that cost it least, [H] int64."""
        of_content = errors * self.band_margin + NEGLIGIBLE_ERROR
        is_textural = tuple(candidate.head_class == HeadClass.TEXTURAL for candidate in self.candidates)
        return torch.where(on_device(is_textural, errors.device, torch.bool), of_content, errors).argmin(1)

    def _of(self, best: Tensor, values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        """What each head's candidate has of these values, one for each candidate, [H]."""
        return on_device(tuple(values), best.device, dtype).index_select(0, best)

    def _scores(
        self, best: Tensor, trials: list[Trial], inputs: Inputs, layout: _Layout, permutation: Permutation
    ) -> Tensor:
        """How much each head's candidate wants each key block, [B|1, H|1, Q, K] float32."""

        def by(rule: str) -> Tensor:
            if rule == "band":
                return layout.band_scores[None, None]
            if rule == "random":
                assert inputs.noise is not None
                return inputs.noise.float()
            orders = list(dict.fromkeys(candidate.order for candidate in self.candidates))
            order_of_head = self._of(best, [orders.index(candidate.order) for candidate in self.candidates])
            tensors = zip(*(vars(trial.means).values() for trial in trials))
            means = Means(*(_chosen(of_orders, order_of_head) for of_orders in tensors))
            return scores_by(rule, means, inputs, layout, permutation.order)

        first, *others = dict.fromkeys(candidate.rule for candidate in self.candidates)
        scores = by(first)
        for rule in others:
            is_of_rule = self._of(best, [candidate.rule == rule for candidate in self.candidates], torch.bool)
            scores = torch.where(is_of_rule[:, None, None], by(rule), scores)
        return scores


def _chosen(tensors: Sequence[Tensor], which: Tensor) -> Tensor:
    """For each head the one of some tensors [B, H, ...] that `which` [H] names, [B, H, ...]."""
    index = which[:, None, None].expand(1, *tensors[0].shape)
    return torch.stack(tuple(tensors)).gather(0, index)[0]


@dataclass(frozen=True, eq=False)
class _Layout(Geometry):
    """The geometry, and how many blocks a density makes of it.

    Attributes:
        budget: key blocks that a query block without text sees, mean over the heads.
        counts: what a head may get instead, ascending.
    """

    budget: int
    counts: list[int]


def _layout(grid: TokenGrid, options: _Sized, device: torch.device) -> _Layout:
    """Of the options. Plans of all densities share the tensors."""
    sizes = options.query_block_size, options.key_block_size
    tile = options.tile or ((4, 4, 4) if grid.frames > 1 else (1, 8, 8))
    geometry = geometry_of(grid, *sizes, tile, options.sampled_rows, options.seed, device)
    key_blocks = geometry.always.shape[1]
    least = max(geometry.seen_by_all, 1)
    budget = min(max(round(options.density * key_blocks), least), key_blocks)
    shares = (1.0,) if options.equal_heads else SHARES
    counts = sorted({min(max(round(share * budget), least), key_blocks) for share in shares} | {budget})
    return _Layout(**vars(geometry), budget=budget, counts=counts)

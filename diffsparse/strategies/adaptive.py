"""The default strategy: for each head the order and the mask that its own sampled rows say cost least."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from diffsparse.block_mask import BlockMask, list_dtype
from diffsparse.grid import TokenGrid
from diffsparse.heads import BlockSums, HeadClass, head_errors, squared_sizes
from diffsparse.kernels.pooling import block_means
from diffsparse.permutation import Permutation
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.adaptive_geometry import ORDERS, Geometry, geometry_of, ranks
from diffsparse.strategies.error_budget import on_device, share_out
from diffsparse.strategies.planning_memory import head_slices
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
        rule: "band" (the nearest blocks), "top" (the highest scores between mean query and mean key) or "random"
            (a baseline to beat).

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


RULES = ("band", "top", "random")

CANDIDATES = (
    Candidate(HeadClass.SPATIAL, "frame-major", "band"),
    Candidate(HeadClass.TEMPORAL, "token-major", "band"),
    Candidate(HeadClass.TEXTURAL, "frame-major", "top"),
    Candidate(HeadClass.TEXTURAL, "token-major", "top"),
    Candidate(HeadClass.TEXTURAL, "tiles", "top"),
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
        if isinstance(self.density, bool) or not isinstance(self.density, (int, float)) or not 0 < self.density <= 1:
            raise ValueError(
                f"`density` must be a fraction above 0 and at most 1, got {self.density!r}. "
                f"To keep a quarter of the key blocks say 0.25."
            )
        for name, least in (("query_block_size", 1), ("key_block_size", 1), ("sampled_rows", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name.endswith("block_size"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
        for name in ("tail", "equal_heads"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if self.tile is not None and (
            not isinstance(self.tile, tuple)
            or len(self.tile) != 3
            or not all(isinstance(side, int) and side > 0 for side in self.tile)
        ):
            raise ValueError(f"`tile` must be frames, height and width in tokens, like (4, 4, 4), got {self.tile!r}.")
        if (
            not isinstance(self.candidates, tuple)
            or not self.candidates
            or not all(isinstance(each, Candidate) for each in self.candidates)
        ):
            raise ValueError(f"`candidates` must be a tuple of at least one Candidate, got {self.candidates!r}.")
        load = self.front_load
        if isinstance(load, bool) or not isinstance(load, (int, float)) or not 0 <= load <= 1:
            raise ValueError(f"`front_load` must be from 0 (the same density at each step) to 1, got {load!r}.")
        if not isinstance(self.band_margin, (int, float)) or not self.band_margin >= 1:
            raise ValueError(f"`band_margin` must be at least 1, got {self.band_margin!r}.")

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
        """Bytes of the lists of key blocks that a layer's first plan, the largest, keeps for a batch of one."""
        layout = _layout(grid, self._sized(grid, progress=0.0), torch.device("cpu"))
        query_blocks, key_blocks = layout.always.shape
        bytes_of_lists = list_dtype(key_blocks).itemsize * (query_blocks - layout.num_complete) * layout.counts[-1]
        return num_heads * (4 * query_blocks + bytes_of_lists)

    def _sized(self, grid: TokenGrid, progress: float | None = None) -> _Sized:
        """These options with the block sizes for a grid, and the density for this part of the sparse steps."""
        query_block_size = LARGE_QUERY_BLOCK if grid.num_tokens >= MANY_TOKENS else BLOCK_SIZE
        load = 0.0 if progress is None else min(self.front_load, 1 / self.density - 1) * (1 - 2 * progress)
        options = {field.name: getattr(self, field.name) for field in fields(Adaptive)}
        options["density"] = self.density * (1 + load)
        options["query_block_size"] = self.query_block_size or query_block_size
        options["key_block_size"] = self.key_block_size or BLOCK_SIZE
        return _Sized(**options)


@dataclass(frozen=True)
class _Sized(Adaptive):
    """Options that leave no block size open."""

    query_block_size: int = 64
    key_block_size: int = 64

    def _plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        layout = _layout(call.grid, self, query.device)
        scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
        parts = [
            self._choose(query[:, heads], key[:, heads], value[:, heads], layout, call.key_length, scale)
            for heads in head_slices(query, self.sampled_rows)
        ]
        choice = _Choice.joined(parts)
        counts = share_out(choice.errors, layout.counts, layout.budget)
        # Where a head's share lies between two that were measured, the tail is that of the smaller.
        share = torch.searchsorted(on_device(tuple(layout.counts), query.device), counts, right=True) - 1
        mask = BlockMask.from_visible(
            (choice.rank < counts[:, None, None]) | layout.always,
            call.grid.num_tokens,
            self.query_block_size,
            self.key_block_size,
            capacity=layout.counts[-1],
            num_complete=layout.num_complete,
        )
        permutation = Permutation(layout.orders, layout.inverse, choice=choice.order)
        tail = choice.tail.gather(1, share[:, None])[:, 0]
        return AttentionPlan(permutation, mask, tail[None] if self.tail else None, choice.classes)

    def _choose(
        self, query: Tensor, key: Tensor, value: Tensor, layout: _Layout, key_length: Tensor | None, scale: float
    ) -> _Choice:
        """The best candidate of each head of query, key, value [B, H, S, D]."""
        rows = query.index_select(2, layout.rows).float() * scale
        best = None
        for name in sorted({candidate.order for candidate in self.candidates}, key=ORDERS.index):
            number = ORDERS.index(name)
            ordered_query, ordered_key, ordered_value = (layout.ordered(x, number) for x in (query, key, value))
            pooled_query, _ = block_means(ordered_query, self.query_block_size)
            pooled_key, _ = block_means(ordered_key, self.key_block_size)
            sums = BlockSums.of(rows, ordered_key, ordered_value, pooled_key, self.key_block_size, key_length)
            exact = sums.exact()
            block_of_row = layout.inverse[number].index_select(0, layout.rows) // self.query_block_size
            for candidate in self.candidates:
                if candidate.order == name:
                    rank = self._rank(candidate.rule, pooled_query, pooled_key, layout)
                    choice = self._judge(candidate, rank, sums, exact, block_of_row, layout)
                    best = choice if best is None else best.or_better(choice)
        assert best is not None
        return best

    def _judge(
        self,
        candidate: Candidate,
        rank: Tensor,
        sums: BlockSums,
        exact: Tensor,
        block_of_row: Tensor,
        layout: _Layout,
    ) -> _Choice:
        """The candidate with what it costs each head: the smaller of the errors with and without the tail."""
        always = layout.always[block_of_row]  # [R, K]
        seen = torch.stack([(rank.index_select(2, block_of_row) < count) | always for count in layout.counts], dim=2)
        error, error_with_tail = (
            head_errors(output, exact[:, :, None]) for output in sums.masked_each(seen.transpose(-1, -2))
        )  # [H, N]
        tail = error_with_tail < error
        if self.tail:
            error = torch.minimum(error, error_with_tail)
        penalised = error[:, layout.counts.index(layout.budget)]
        if candidate.head_class is HeadClass.TEXTURAL:
            penalised = penalised * self.band_margin + NEGLIGIBLE_ERROR
        return _Choice(
            penalised,
            error * squared_sizes(exact)[:, None],
            rank.expand(-1, len(error), -1, -1),
            tail,
            torch.full_like(penalised, ORDERS.index(candidate.order), dtype=torch.long),
            torch.full_like(penalised, candidate.head_class, dtype=torch.long),
        )

    def _rank(self, rule: str, pooled_query: Tensor, pooled_key: Tensor, layout: _Layout) -> Tensor:
        """The place of each key block in the order in which a rule wants them, [B|1, H|1, Q, K] int32.

        `layout.always` comes first. Beyond the largest share of a head scores all have the same place, K.
        """
        if rule == "band":
            return layout.band_rank[None, None]
        scores = pooled_query @ pooled_key.transpose(-1, -2)
        if rule == "random":
            generator = torch.Generator(scores.device).manual_seed(self.seed)
            scores = torch.rand(scores.shape, generator=generator, device=scores.device)
        return ranks(scores.masked_fill(layout.always, torch.inf), layout.counts[-1])


@dataclass(frozen=True, eq=False)
class _Choice:
    """What each head would run, all on the device.

    Attributes:
        error: [H], what it costs at the mean budget, by which candidates are compared.
        errors: [H, N], squared error on the sampled rows at each share of the budget.
        rank: [B|1, H, Q, K] int32, in which order blocks are taken.
        tail: [H, N] bool, whether the pooled tail helps there.
        order, classes: [H] int64, index into ORDERS and `HeadClass`.
    """

    error: Tensor
    errors: Tensor
    rank: Tensor
    tail: Tensor
    order: Tensor
    classes: Tensor

    @classmethod
    def joined(cls, parts: list[_Choice]) -> _Choice:
        """The heads of all parts."""
        names = (field.name for field in fields(cls))
        return cls(*(torch.cat([getattr(part, n) for part in parts], dim=1 if n == "rank" else 0) for n in names))

    def or_better(self, other: _Choice) -> _Choice:
        """For each head this one, or the other where its error is smaller."""
        better = other.error < self.error
        return _Choice(
            torch.where(better, other.error, self.error),
            torch.where(better[:, None], other.errors, self.errors),
            torch.where(better[:, None, None], other.rank, self.rank),
            torch.where(better[:, None], other.tail, self.tail),
            torch.where(better, other.order, self.order),
            torch.where(better, other.classes, self.classes),
        )


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

"""PAROAttention: for each head the order of the axes that gathers its attention in blocks, and its heaviest blocks."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.block_mask import BlockMask, num_blocks
from diffsparse.grid import TokenGrid
from diffsparse.kernels.pooling import block_token_counts
from diffsparse.permutation import Permutation, axis_order
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.always_exact import exact_blocks
from diffsparse.strategies.block_attention import by_block, scores_of_rows
from diffsparse.strategies.option_checks import check_block_sizes, check_density, check_integers, check_shares
from diffsparse.strategies.planning_memory import head_slices
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.top_blocks import top_blocks

AXES = (
    ("frame", "height", "width"),
    ("frame", "width", "height"),
    ("height", "width", "frame"),
    ("height", "frame", "width"),
    ("width", "height", "frame"),
    ("width", "frame", "height"),
)
"""The six orders, outermost axis first."""

ROWS_AT_A_TIME = 128
"""Query rows whose attention to all keys is held at a time."""


@dataclass(frozen=True)
class PAROAttention:
    """One of six axis orders for each head, and in it the blocks that hold most of its attention.

    PAROAttention, arXiv:2506.16054, without its quantization. An order is good when many blocks of its attention map
    are nearly empty, and when the values within a block are alike (max over mean): the smallest
    `alpha` x share of blocks that are not empty + (1 - `alpha`) x incoherence, each divided by its sum over the six.
    (The paper takes the smallest share of *empty* blocks, which must be meant the other way round.) The blocks with
    the largest sums of attention are seen, as many as `density` says of each head, however they fall on its rows.
    Text sees all and is seen by all, and each block sees its own place.

    The paper decides offline, on attention maps of one or two calibration prompts. Here the layer's own queries and
    keys decide when it is planned: the order on a few whole query blocks, the sums on a few rows of each query block,
    all guidance branches together. The paper has a mask for each step of the first half, and one for all of the
    second. For that plan at every step, `SparseAttentionConfig(PAROAttention(), replan_every=1)`: the first plan from
    `shared_from` on lasts. Where nothing says how many steps there are, no plan lasts.

    Args:
        density: share of a head's pairs of blocks that are seen, 0–1. The paper shows 0.5, 0.3 and 0.2.
        alpha: weight of sparsity against incoherence, 0–1. The paper does not say which it takes.
        negligible: attention below this is as good as none.
        empty_share: share of negligible values from which on a block is empty.
        shared_from: share of the steps from which on one plan serves all.
        sampled_blocks: query blocks a head that judge the orders.
        sampled_rows: rows of each query block that stand for its sums. With as many as a block has tokens they are
            exact, at the cost of dense attention.
        query_block_size, key_block_size: tokens a block.

    Raises:
        ValueError: an option out of its range.
    """

    density: float = 0.5
    alpha: float = 0.5
    negligible: float = 1e-3
    empty_share: float = 0.9
    shared_from: float = 0.5
    sampled_blocks: int = 4
    sampled_rows: int = 4
    query_block_size: int = 64
    key_block_size: int = 64

    def __post_init__(self) -> None:
        check_density(self.density)
        check_shares(alpha=self.alpha, negligible=self.negligible)
        check_shares(empty_share=self.empty_share, shared_from=self.shared_from)
        check_integers(1, sampled_blocks=self.sampled_blocks, sampled_rows=self.sampled_rows)
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        layout = _layout(call.grid, self, query.device)
        permutation = Permutation(layout.orders, self._best_orders(query, key, layout, call))
        sums = self._block_sums(query, key, permutation, layout, call)
        pairs = sums.flatten(1)
        visible = top_blocks(pairs, round(self.density * pairs.shape[1]), layout.exact.flatten())
        sizes = call.grid.num_tokens, self.query_block_size, self.key_block_size
        return AttentionPlan(
            permutation,
            BlockMask.from_visible(visible.view(1, *sums.shape), *sizes),
            lasts=call.num_steps is not None and call.step >= self.shared_from * call.num_steps,
        )

    def _best_orders(self, query: Tensor, key: Tensor, layout: _Layout, call: AttentionCall) -> Tensor:
        """Which of the six orders each head takes, [H] int64, of query and key [B, H, S, D]."""
        best = []
        for heads in head_slices(query, 3 * layout.rows.shape[1]):
            measures = [
                self._measures(query[:, heads], key[:, heads], layout, number, call) for number in range(len(AXES))
            ]
            full, incoherence = (torch.stack(each) for each in zip(*measures))  # [6, H]
            best.append((self.alpha * _shares(full) + (1 - self.alpha) * _shares(incoherence)).argmin(0))
        return torch.cat(best)

    def _measures(
        self, query: Tensor, key: Tensor, layout: _Layout, number: int, call: AttentionCall
    ) -> tuple[Tensor, Tensor]:
        """Share of blocks that are not empty, and their mean incoherence, in one order by head: two of [H]."""
        order = Permutation(layout.orders[number, None])
        rows = layout.rows[number]  # of whole blocks, one after the other
        tokens = min(self.query_block_size, len(rows))
        attention = _attention(query.index_select(2, rows), order.apply(key), call)
        attention = attention[..., : call.grid.num_video_tokens]

        def in_blocks(x: Tensor) -> Tensor:
            """x [B, H, R, V] as [B, H, blocks of queries, blocks of keys, values of a block], filled up with 0."""
            filled = F.pad(x, (0, -x.shape[-1] % self.key_block_size))
            return filled.unflatten(3, (-1, self.key_block_size)).unflatten(2, (-1, tokens)).transpose(3, 4).flatten(4)

        values = tokens * block_token_counts(call.grid.num_video_tokens, self.key_block_size, device=query.device)[0]
        is_empty = in_blocks(attention < self.negligible).sum(-1) >= self.empty_share * values
        blocks = in_blocks(attention)
        incoherence = blocks.amax(-1) / (blocks.sum(-1) / values).clamp(min=1e-12)
        return 1 - is_empty.float().mean((0, 2, 3)), incoherence.mean((0, 2, 3))

    def _block_sums(
        self, query: Tensor, key: Tensor, permutation: Permutation, layout: _Layout, call: AttentionCall
    ) -> Tensor:
        """Attention of each query block to each key block in the heads' orders, over the batch: [H, Q, K].

        query and key are [B, H, S, D] in their own order.
        """
        assert permutation.choice is not None
        rows_of_block = layout.places.shape[1]
        sums = []
        for heads in head_slices(query, 2 * ROWS_AT_A_TIME):
            order = Permutation(permutation.orders, permutation.choice[heads])
            queries, keys = order.apply(query[:, heads]), order.apply(key[:, heads]).float()
            parts = []
            for places in layout.places.split(max(1, ROWS_AT_A_TIME // rows_of_block)):
                attention = _attention(queries.index_select(2, places.flatten()), keys, call)
                of_rows = by_block(attention, self.key_block_size)
                parts.append(of_rows.unflatten(2, (-1, rows_of_block)).mean(3).sum(0))
            sums.append(torch.cat(parts, dim=1) * layout.tokens_of_block[:, None])
        return torch.cat(sums)


def _attention(query: Tensor, key: Tensor, call: AttentionCall) -> Tensor:
    """Softmax of the scores of query [B, H, R, D] and key [B, H, S, D], [B, H, R, S] float32."""
    return scores_of_rows(query.float() * call.scale_of(query), key, call.key_length).softmax(-1)


def _shares(measure: Tensor) -> Tensor:
    """What is measured of the six orders [6, H], divided by its sum."""
    return measure / measure.sum(0).clamp(min=1e-12)


@dataclass(frozen=True, eq=False)
class _Layout:
    """What depends on the grid and the options alone.

    Attributes:
        orders: of `AXES`, [6, S].
        rows: the tokens of the sampled query blocks in each order, block after block, [6, R].
        places: the sampled rows of each query block, as places in the order, [Q, rows of a block].
        tokens_of_block: of each query block, [Q].
        exact: what is seen in any case, [Q, K] bool.
    """

    orders: Tensor
    rows: Tensor
    places: Tensor
    tokens_of_block: Tensor
    exact: Tensor


@functools.lru_cache(maxsize=16)
def _layout(grid: TokenGrid, options: PAROAttention, device: torch.device) -> _Layout:
    size, blocks = options.query_block_size, num_blocks(grid.num_tokens, options.query_block_size)
    orders = torch.stack([axis_order(grid, axes) for axes in AXES])
    whole = grid.num_video_tokens // size
    sampled = torch.arange(min(options.sampled_blocks, whole))
    sampled = (2 * sampled + 1) * whole // (2 * max(1, len(sampled)))  # the middles of as many stretches
    # A video shorter than a block is its own block.
    of_blocks = sampled[:, None] * size + torch.arange(size) if whole else torch.arange(grid.num_video_tokens)[None]
    tokens_of_block = block_token_counts(grid.num_tokens, size)[0]
    count = min(options.sampled_rows, size)
    within = (2 * torch.arange(count) + 1) * tokens_of_block[:, None] // (2 * count)
    return _Layout(
        orders=orders.to(device),
        rows=orders[:, of_blocks.flatten()].to(device),
        places=(torch.arange(blocks)[:, None] * size + within).to(device),
        tokens_of_block=tokens_of_block.to(device),
        exact=exact_blocks(grid, size, options.key_block_size).to(device),
    )

"""Where the tokens of a grid lie in each of the default strategy's orders, and what depends on it at any density."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.heads import sample_rows
from diffsparse.kernels.pooling import block_token_counts
from diffsparse.permutation import axis_order, tile_order
from diffsparse.strategies.always_exact import block_distance, exact_blocks

ORDERS = ("frame-major", "token-major", "tiles")


@dataclass(frozen=True, eq=False)
class Geometry:
    """What depends on the grid and the block sizes, at any density.

    Attributes:
        orders: each of `ORDERS`, [3, S].
        rows: the sampled rows, [R].
        blocks_of_rows: the query block that each of them lies in, by order, [3, R].
        always: what every query block of every order sees, [Q, K] bool: text, and itself.
        band_rank: the place of each block by its distance from the diagonal, [Q, K] int32, `always` first.
        band_scores: the nearest highest, [Q, K] float32.
        always_of_rows, band_rank_of_rows: those of the query blocks of the sampled rows, by order, [3, R, K].
        log_key_block_sizes: the logarithm of the number of tokens of each key block, [K] float32.
        seen_by_all: the most key blocks in `always` of a query block without text.
        starts_with_video: whether the frame-major order is the tokens' own.
        query_block_size, key_block_size: tokens a block.
    """

    orders: Tensor
    rows: Tensor
    blocks_of_rows: Tensor
    always: Tensor
    band_rank: Tensor
    band_scores: Tensor
    always_of_rows: Tensor
    band_rank_of_rows: Tensor
    log_key_block_sizes: Tensor
    seen_by_all: int
    starts_with_video: bool
    query_block_size: int
    key_block_size: int

    def order(self, number: int) -> Tensor | None:
        """The order of this number, [S] int64; None for the tokens' own."""
        return None if number == 0 and self.starts_with_video else self.orders[number]


@functools.lru_cache(maxsize=16)
def geometry_of(
    grid: TokenGrid,
    query_block_size: int,
    key_block_size: int,
    tile: tuple[int, int, int],
    sampled_rows: int,
    seed: int,
    device: torch.device,
) -> Geometry:
    """The geometry of a grid cut into blocks; `tile` is of the third order. Kept for the grids used last."""
    orders = torch.stack(
        [
            axis_order(grid, ("frame", "height", "width")),
            axis_order(grid, ("height", "width", "frame")),
            tile_order(grid, tile),
        ]
    )
    rows = sample_rows(grid, sampled_rows, seed)
    first_text_query = grid.num_video_tokens // query_block_size
    always = exact_blocks(grid, query_block_size, key_block_size)
    distance = block_distance(grid.num_tokens, query_block_size, key_block_size)
    band_rank = ranks(-distance.masked_fill(always, -1.0), always.shape[1])
    blocks_of_rows = torch.argsort(orders, dim=-1)[:, rows] // query_block_size
    sizes = block_token_counts(grid.num_tokens, key_block_size, device=rows.device)[0]
    return Geometry(
        orders=orders.to(device),
        rows=rows.to(device),
        blocks_of_rows=blocks_of_rows.to(device),
        always=always.to(device),
        band_rank=band_rank.to(device),
        band_scores=-band_rank.to(device, torch.float32),
        always_of_rows=always[blocks_of_rows].to(device),
        band_rank_of_rows=band_rank[blocks_of_rows].to(device),
        log_key_block_sizes=sizes.float().log().to(device),
        seen_by_all=int(always[:first_text_query].sum(-1).max()) if first_text_query else 0,
        starts_with_video=grid.text_before == 0,
        query_block_size=query_block_size,
        key_block_size=key_block_size,
    )


def ranks(scores: Tensor, count: int) -> Tensor:
    """The place of each of scores [..., K], the highest first, int32; K for those behind the first `count`."""
    first = scores.topk(count, dim=-1).indices
    places = torch.arange(count, dtype=torch.int32, device=scores.device)
    behind = torch.full_like(scores, scores.shape[-1], dtype=torch.int32)
    return behind.scatter_(-1, first, places.expand_as(first))

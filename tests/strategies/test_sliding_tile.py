from __future__ import annotations

import pytest
import torch
from plain_rules import always, blocks_of, order_of, random_qkv, visible_of

from diffsparse import SlidingTile
from diffsparse.grid import TokenGrid
from diffsparse.strategies.strategy import AttentionCall


def window(place: int, count: int, width: int) -> list[int]:
    """The `width` tiles around one of `count`: as near to the middle as the border allows."""
    first = place - width // 2
    while first + width > count:
        first -= 1
    first = max(first, 0)
    return [tile for tile in range(first, first + width) if tile < count]


def tile_of(token: int, grid: TokenGrid, tile: tuple[int, int, int]) -> tuple[int, int, int]:
    frame, place = divmod(token - grid.text_before, grid.height * grid.width)
    row, column = divmod(place, grid.width)
    return frame // tile[0], row // tile[1], column // tile[2]


@pytest.mark.parametrize("grid", [TokenGrid(5, 6, 7, 2, 3), TokenGrid(4, 6, 4), TokenGrid(1, 9, 11)], ids=str)
@pytest.mark.parametrize("width", [(1, 2, 3), (3, 1, 1)])
def test_a_block_sees_every_block_with_a_tile_of_its_window(grid, width):
    options = SlidingTile(tile=(2, 3, 2), window=width, query_block_size=12, key_block_size=6)
    plan = options.plan(*random_qkv(grid), AttentionCall(grid))
    order = order_of(plan, grid)
    sizes = [-(-size // side) for size, side in zip((grid.frames, grid.height, grid.width), options.tile)]
    tiles = [
        {tile_of(token, grid, options.tile) for token in order[: grid.num_video_tokens][first : first + 6]}
        for first in range(0, grid.num_tokens, 6)
    ]
    assert [tile_of(token, grid, options.tile) for token in order[: grid.num_video_tokens]] == sorted(
        tile_of(token, grid, options.tile) for token in order[: grid.num_video_tokens]
    )
    wanted = always(blocks_of(order, 12), blocks_of(order, 6), grid)
    for row, sees in enumerate(wanted):
        for column in range(len(sees)):
            sees[column] |= any(
                all(k in window(q, size, wide) for q, k, size, wide in zip(mine, other, sizes, width))
                for half in tiles[2 * row : 2 * row + 2]
                for mine in half
                for other in tiles[column]
            )
    assert visible_of(plan) == wanted


@pytest.mark.parametrize(("width", "share"), [((3, 3, 3), 27 / 300), ((5, 6, 1), 30 / 300), ((1, 6, 10), 60 / 300)])
def test_whole_tiles_see_the_share_of_the_paper(width, share):
    """30 x 48 x 80 tokens are 5 x 6 x 10 tiles of three blocks each."""
    grid = TokenGrid(30, 48, 80)
    query = torch.zeros(1, 2, 1, 8).expand(-1, -1, grid.num_tokens, -1)
    plan = SlidingTile(window=width).plan(query, query, query, AttentionCall(grid))
    assert plan.mask.counts.unique().tolist() == [round(share * 900)]


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"`tile` must be 3 positive integers, like \(6, 8, 8\), got \(6, 8\)"):
        SlidingTile(tile=(6, 8))

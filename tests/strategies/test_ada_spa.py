from __future__ import annotations

import pytest
import torch
from plain_rules import always, blocks_of, frame_major, highest, maps_of_the_video, random_qkv, visible_of

from diffsparse import AdaSpa
from diffsparse.grid import TokenGrid
from diffsparse.strategies.strategy import AttentionCall

SIZES = {"query_block_size": 16, "key_block_size": 8}
GRIDS = [TokenGrid(3, 5, 7), TokenGrid(3, 5, 7, 2, 9), TokenGrid(2, 3, 3)]


def shares_of(query, key, grid: TokenGrid) -> list[list[float]]:
    """Of one head [S, D]: what each query block gives each key block of the whole softmax."""
    order = frame_major(grid)
    weights = (query @ key.T * 24**-0.5).softmax(-1)
    return [[float(weights[q][:, k].sum(1).mean()) for k in blocks_of(order, 8)] for q in blocks_of(order, 16)]


def seen_by(shares, count: int, grid: TokenGrid) -> list[list[bool]]:
    order = frame_major(grid)
    exact = always(blocks_of(order, 16), blocks_of(order, 8), grid)
    return [highest(row, count, kept) for row, kept in zip(shares, exact)]


def recall_of(shares, seen) -> float:
    return float(torch.tensor(shares).where(torch.tensor(seen), 0.0).sum(1).mean())


def heads_of_falling_recall(grid: TokenGrid) -> list[torch.Tensor]:
    """Five heads, out of order: the sharper the scores of one, the more of its attention few blocks hold."""
    query, key, value = random_qkv(grid, heads=5)
    return [query * torch.tensor([1.0, 16, 0.1, 8, 4])[:, None, None], key, value]


@pytest.mark.parametrize("num_above", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_heads_above_the_recall_see_half_and_as_many_of_the_lowest_half_as_much_again(grid, num_above):
    query, key, value = heads_of_falling_recall(grid)
    blocks = -(-grid.num_tokens // 8)
    shares = [shares_of(query[0, head], key[0, head], grid) for head in range(5)]
    recalls = [recall_of(each, seen_by(each, round(0.4 * blocks), grid)) for each in shares]
    falling = sorted(range(5), key=lambda head: -recalls[head])
    bounds = [1.0, *(recalls[head] for head in falling), 0.0]
    plan = AdaSpa(density=0.4, recall=sum(bounds[num_above : num_above + 2]) / 2, **SIZES).plan(
        query, key, value, AttentionCall(grid)
    )
    changed = min(num_above, 2)
    for place, head in enumerate(falling):
        part = 0.5 if place < changed else 1.5 if place >= 5 - changed else 1.0
        wanted = seen_by(shares[head], round(part * 0.4 * blocks), grid)
        assert visible_of(plan, head=head) == wanted


def test_keys_that_do_not_exist_hold_nothing():
    # Two of the fourteen blocks are text, and are seen in any case: two more are left of four.
    four, two = (AdaSpa(density, recall=1.0, **SIZES) for density in (0.3, 2 / 12))
    assert torch.equal(*maps_of_the_video(four, two, TokenGrid(3, 4, 8, text_after=16)))


def test_options_are_checked():
    with pytest.raises(ValueError, match="`recall` must be a number from 0 to 1, got 80"):
        AdaSpa(recall=80)

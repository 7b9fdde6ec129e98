from __future__ import annotations

import itertools

import pytest
import torch
from plain_rules import always, blocks_of, fewest, highest, is_text, order_of, random_qkv, visible_of

from diffsparse import Jenga
from diffsparse.grid import TokenGrid
from diffsparse.permutation import hilbert_order
from diffsparse.strategies.jenga import touching_blocks
from diffsparse.strategies.strategy import AttentionCall

GRIDS = [TokenGrid(4, 6, 8), TokenGrid(3, 5, 7, 2, 9), TokenGrid(1, 9, 11, text_before=20)]


def place_of(token: int, grid: TokenGrid) -> tuple[int, int, int]:
    frame, place = divmod(token - grid.text_before, grid.height * grid.width)
    return frame, *divmod(place, grid.width)


def touch(one: list[int], other: list[int], grid: TokenGrid) -> bool:
    places = [[place_of(token, grid) for token in block if not is_text(token, grid)] for block in (one, other)]
    return any(all(abs(a - b) <= 1 for a, b in zip(*pair)) for pair in itertools.product(*places))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_touch_where_tokens_are_neighbours(grid):
    order = hilbert_order(grid)
    wanted = [[touch(q, k, grid) for k in blocks_of(order.tolist(), 4)] for q in blocks_of(order.tolist(), 8)]
    assert touching_blocks(grid, order, 8, 4).tolist() == wanted
    assert not all(map(all, wanted))


@pytest.mark.parametrize(("density", "mass"), [(0.3, 0.0), (0.1, 0.6), (0.25, 0.5)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_highest_scores_are_seen_or_more_that_reach_the_mass_and_what_touches(grid, density, mass):
    query, key, value = (x * scale for x, scale in zip(random_qkv(grid), (3, 3, 1)))
    for neighbours in (True, False):
        options = Jenga(density, mass, neighbours, query_block_size=8, key_block_size=4)
        plan = options.plan(query, key, value, AttentionCall(grid))
        order = order_of(plan, grid)
        assert order == hilbert_order(grid).tolist()
        queries, keys = blocks_of(order, 8), blocks_of(order, 4)
        exact = always(queries, keys, grid)
        has_text = torch.tensor([any(is_text(token, grid) for token in block) for block in keys])
        for head in range(3):
            means = torch.stack([key[0, head, block].mean(0) for block in keys])
            wanted = []
            for number, block in enumerate(queries):
                scores = (means @ query[0, head, block].mean(0) * 24**-0.5).masked_fill(has_text, -torch.inf)
                shares = scores.softmax(-1).tolist()
                none = [False] * len(keys)
                by_count = highest(shares, int(density * len(keys)), none)
                by_mass = fewest(shares, mass, none)
                near = [neighbours and touch(block, other, grid) for other in keys]
                wanted.append([any(each) for each in zip(by_count, by_mass, near, exact[number])])
            assert visible_of(plan, head=head) == wanted


def test_a_grid_of_a_token_is_seen():
    grid = TokenGrid(1, 1, 1, text_after=3)
    assert visible_of(Jenga().plan(*random_qkv(grid), AttentionCall(grid))) == [[True]]


def test_options_are_checked():
    with pytest.raises(ValueError, match="`neighbours` must be True or False, got 1"):
        Jenga(neighbours=1)

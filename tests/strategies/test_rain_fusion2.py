from __future__ import annotations

import math

import pytest
import torch
from plain_rules import always, blocks_of, highest, order_of, random_qkv, visible_of

from diffsparse import RainFusion2
from diffsparse.grid import TokenGrid
from diffsparse.strategies.strategy import AttentionCall

SMALL = {"density": 0.3, "window": (2, 4), "query_block_size": 16, "key_block_size": 8}


@pytest.mark.parametrize("grid", [TokenGrid(4, 4, 8), TokenGrid(4, 5, 7, 2, 9), TokenGrid(1, 9, 11)], ids=str)
@pytest.mark.parametrize("first_frame", [True, False])
def test_each_head_sees_the_highest_scores_and_the_first_frame(grid, first_frame):
    query, key, value = random_qkv(grid)
    options = RainFusion2(first_frame=first_frame, **SMALL)
    plan = options.plan(query, key, value, AttentionCall(grid))
    order = order_of(plan, grid)
    queries, keys = blocks_of(order, 16), blocks_of(order, 8)
    exact = always(queries, keys, grid)
    if first_frame and grid.frames > 1:
        frame = set(range(grid.text_before, grid.text_before + grid.height * grid.width))
        exact = [[seen or bool(frame & {*q, *k}) for seen, k in zip(row, keys)] for row, q in zip(exact, queries)]
    for head in range(3):
        wanted = []
        for row, q in zip(exact, queries):
            scores = [float(query[0, head, q].mean(0) @ key[0, head, k].mean(0)) for k in keys]
            chosen = highest(scores, math.ceil(0.3 * len(keys)), [False] * len(keys))
            wanted.append([a or b for a, b in zip(row, chosen)])
        assert visible_of(plan, head=head) == wanted


def test_a_block_of_an_even_grid_is_two_windows_of_a_frame():
    grid = TokenGrid(3, 16, 24)
    plan = RainFusion2(first_frame=False).plan(*random_qkv(grid), AttentionCall(grid))
    for tokens in torch.tensor(order_of(plan, grid)).split(64):
        frame, row, column = tokens // 384, tokens % 384 // 24, tokens % 24
        assert [(x.min() // n, x.max() // n) for x, n in ((frame, 1), (row, 8), (column, 8))] == [
            (x[0] // n, x[0] // n) for x, n in ((frame, 1), (row, 8), (column, 8))
        ]


def test_options_are_checked():
    with pytest.raises(ValueError, match="`first_frame` must be True or False, got None"):
        RainFusion2(first_frame=None)

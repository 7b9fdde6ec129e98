from __future__ import annotations

import pytest
from plain_rules import always, blocks_of, fewest, frame_major, random_qkv, visible_of

from diffsparse import SampleAttention
from diffsparse.grid import TokenGrid
from diffsparse.heads import sample_rows
from diffsparse.strategies.strategy import AttentionCall

OPTIONS = SampleAttention(window=0.2, mass=0.5, sampled_rows=6, block_size=8)


@pytest.mark.parametrize("grid", [TokenGrid(3, 5, 7), TokenGrid(3, 5, 7, 2, 9)], ids=str)
def test_each_head_sees_a_window_and_the_columns_that_sampled_queries_look_at(grid):
    query, key, value = random_qkv(grid)
    plan = OPTIONS.plan(3 * query, key, value, AttentionCall(grid))
    order = frame_major(grid)
    blocks = blocks_of(order, 8)
    exact = [
        [seen or abs(q - k) <= 0.1 * len(blocks) for k, seen in enumerate(row)]
        for q, row in enumerate(always(blocks, blocks, grid))
    ]
    for head in range(3):
        mass = [0.0] * len(blocks)
        for token in sample_rows(grid, 6).tolist():
            weights = (3 * query[0, head, token] @ key[0, head].T * 24**-0.5).softmax(-1)
            for k, tokens in enumerate(blocks):
                if not exact[order.index(token) // 8][k]:
                    mass[k] += float(weights[tokens].sum()) / 6
        columns = fewest(mass, 0.5, [False] * len(blocks))
        assert visible_of(plan, head=head) == [[a or b for a, b in zip(row, columns)] for row in exact]

from __future__ import annotations

import pytest
from plain_rules import always, blocks_of, frame_major, random_qkv, visible_of

from diffsparse import S2Attention
from diffsparse.grid import TokenGrid
from diffsparse.strategies.strategy import AttentionCall


@pytest.mark.parametrize("grid", [TokenGrid(5, 6, 8), TokenGrid(3, 5, 7, 2, 9)], ids=str)
@pytest.mark.parametrize(("stride", "step"), [(3, 1), (8, 2)])
def test_each_head_sees_its_neighbourhood_and_its_shard(grid, stride, step):
    plan = S2Attention(local_blocks=2, stride=stride, block_size=8).plan(
        *random_qkv(grid, heads=4), AttentionCall(grid)
    )
    blocks = blocks_of(frame_major(grid), 8)
    exact = always(blocks, blocks, grid)
    for head in range(4):
        assert visible_of(plan, head=head) == [
            [seen or abs(q - k) < 2 or (k + head * step) % stride == 0 for k, seen in enumerate(row)]
            for q, row in enumerate(exact)
        ]


def test_as_many_heads_as_the_stride_see_everything_between_them():
    grid = TokenGrid(5, 6, 8)
    plan = S2Attention(local_blocks=1, stride=4, block_size=8).plan(*random_qkv(grid, heads=4), AttentionCall(grid))
    assert plan.mask.visible().any(1).all()
    assert plan.mask.density.max() < 0.3

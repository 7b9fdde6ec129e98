from __future__ import annotations

import pytest
import torch
from plain_rules import always, blocks_of, frame_major, is_text

from diffsparse.grid import TokenGrid
from diffsparse.strategies.block_layout import block_layout

CPU = torch.device("cpu")
GRIDS = [TokenGrid(3, 5, 7), TokenGrid(3, 5, 7, 2, 9), TokenGrid(1, 9, 11, text_before=20)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tile", [None, (2, 2, 4)])
@pytest.mark.parametrize("first_frame", [True, False])
def test_free_blocks_come_first_and_hold_nothing_that_is_exact(grid, tile, first_frame):
    layout = block_layout(grid, 16, 8, CPU, tile=tile, first_frame=first_frame)
    order = list(range(grid.num_tokens)) if layout.permutation is None else layout.permutation.order[0].tolist()
    assert sorted(order) == list(range(grid.num_tokens))
    first = set(range(grid.text_before, grid.text_before + grid.height * grid.width))
    frame = first if first_frame and grid.frames > 1 else set()
    queries, keys = blocks_of(order, 16), blocks_of(order, 8)
    for free, blocks in ((layout.free_queries, queries), (layout.free_keys, keys)):
        is_exact = [any(is_text(token, grid) or token in frame for token in block) for block in blocks]
        assert is_exact == [False] * free + [True] * (len(blocks) - free)
    assert layout.always[layout.free_queries :].all()
    assert layout.always[:, layout.free_keys :].all()
    free = slice(layout.free_queries), slice(layout.free_keys)
    assert layout.always[free].tolist() == [row[free[1]] for row in always(queries, keys, grid)[free[0]]]


def test_tokens_that_are_in_order_already_are_left_alone():
    x = torch.randn(1, 2, 105, 3)
    assert block_layout(GRIDS[0], 16, 8, CPU).ordered(x) is x
    x = torch.randn(1, 2, 116, 3)
    layout = block_layout(GRIDS[1], 16, 8, CPU)
    assert torch.equal(layout.ordered(x), x[:, :, frame_major(GRIDS[1])])

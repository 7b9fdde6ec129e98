from __future__ import annotations

import pytest
import torch
from plain_rules import always, blocks_of, order_of, random_qkv, visible_of

from diffsparse import DraftAttention
from diffsparse.grid import TokenGrid
from diffsparse.strategies.strategy import AttentionCall

OPTIONS = DraftAttention(density=0.3, patch=(2, 4), query_block_size=16, key_block_size=8)


@pytest.mark.parametrize("grid", [TokenGrid(3, 4, 8), TokenGrid(3, 5, 7, 2, 9), TokenGrid(3, 5, 7)], ids=str)
def test_each_head_keeps_the_largest_entries_of_its_draft(grid):
    query, key, value = random_qkv(grid)
    plan = OPTIONS.plan(query * 3, key, value, AttentionCall(grid))
    order = order_of(plan, grid)
    queries, keys = blocks_of(order, 16), blocks_of(order, 8)
    exact = torch.tensor(always(queries, keys, grid))
    has_text = grid.num_tokens > grid.num_video_tokens
    rows = grid.num_video_tokens // 16 if has_text else len(queries)
    columns = grid.num_video_tokens // 8 if has_text else len(keys)
    for head in range(3):
        means = [[x[0, head, block].mean(0) for block in blocks] for x, blocks in ((query, queries), (key, keys))]
        scores = [[float(3 * q @ k) * 24**-0.5 for k in means[1][:columns]] for q in means[0][:rows]]
        draft = torch.tensor(scores).softmax(-1)
        draft[exact[:rows, :columns]] = 2.0
        smallest = draft.flatten().sort(descending=True).values[round(0.3 * rows * columns) - 1]
        wanted = exact.clone()
        wanted[:rows, :columns] |= draft >= smallest
        assert visible_of(plan, head=head) == wanted.tolist()


def test_patches_are_blocks_where_they_divide_the_grid():
    grid = TokenGrid(2, 16, 32)
    plan = DraftAttention().plan(*random_qkv(grid), AttentionCall(grid))
    for tokens in torch.tensor(order_of(plan, grid)).split(128):
        frame, row, column = tokens // 512, tokens % 512 // 32, tokens % 32
        assert (len(frame.unique()), len(row.unique()), len(column.unique())) == (1, 8, 16)


def test_busy_rows_get_more_and_no_row_gets_nothing():
    grid = TokenGrid(4, 8, 8)
    query, key, value = random_qkv(grid)
    query[:, :, :32], key[:, :, :64] = 10.0, 10.0  # the first two query blocks attend to few keys, the rest to none
    counts = OPTIONS.plan(query, key, value, AttentionCall(grid)).mask.counts
    assert counts.min() >= 2  # itself: a query block is two key blocks
    assert counts.unique().numel() > 1


def test_options_are_checked():
    with pytest.raises(ValueError, match="`density` must be a fraction above 0 and at most 1, got 0"):
        DraftAttention(density=0)
    with pytest.raises(ValueError, match="`patch` must be 2 positive integers"):
        DraftAttention(patch=(8, 0))

from __future__ import annotations

import pytest
import torch
from plain_rules import always, blocks_of, frame_major, highest, random_qkv, visible_of

from diffsparse import SparseD
from diffsparse.grid import TokenGrid
from diffsparse.strategies.strategy import AttentionCall

OPTIONS = SparseD(density=0.3, query_block_size=16, key_block_size=8)


def expected(query, key, grid: TokenGrid, num_keys: int) -> list[list[bool]]:
    """The rule for one head [S, D], from the whole softmax."""
    order = frame_major(grid)
    weights = torch.zeros(grid.num_tokens, grid.num_tokens)
    weights[:, order[:num_keys]] = (query @ key[order[:num_keys]].T * 24**-0.5).softmax(-1)
    queries, keys = blocks_of(order, 16), blocks_of(order, 8)
    existing = [[token for token in block if token in set(order[:num_keys])] for block in keys]
    rows = []
    for block, exact in zip(queries, always(queries, keys, grid)):
        means = [float(weights[block][:, tokens].mean()) if tokens else 0.0 for tokens in existing]
        rows.append(highest(means, int(0.3 * len(keys)) + 1, exact))
    return rows


@pytest.mark.parametrize("grid", [TokenGrid(3, 5, 7), TokenGrid(3, 5, 7, 2, 9), TokenGrid(2, 3, 3)], ids=str)
def test_the_highest_means_of_the_exact_softmax_are_seen(grid):
    query, key, value = random_qkv(grid)
    plan = OPTIONS.plan(2 * query, key, value, AttentionCall(grid))
    assert plan.lasts
    for head in range(3):
        assert visible_of(plan, head=head) == expected(2 * query[0, head], key[0, head], grid, grid.num_tokens)


def test_keys_that_do_not_exist_take_no_part():
    grid = TokenGrid(3, 5, 7, text_after=20)
    query, key, value = random_qkv(grid, batch=2, heads=1)
    key[0, :, 110:] = torch.nan
    length = torch.tensor([110, 125], dtype=torch.int32)
    plan = OPTIONS.plan(query, key, value, AttentionCall(grid, key_length=length))
    for element in range(2):
        wanted = expected(query[element, 0], key[element, 0], grid, int(length[element]))
        assert visible_of(plan, batch=element) == wanted

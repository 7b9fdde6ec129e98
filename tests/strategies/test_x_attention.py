from __future__ import annotations

import pytest
import torch
from plain_rules import always, blocks_of, fewest, frame_major, random_qkv, visible_of

from diffsparse import XAttention
from diffsparse.grid import TokenGrid
from diffsparse.strategies.strategy import AttentionCall

GRIDS = [TokenGrid(3, 5, 7), TokenGrid(3, 5, 7, 2, 9), TokenGrid(2, 3, 3)]
OPTIONS = XAttention(mass=0.6, stride=4, query_block_size=16, key_block_size=8)


def expected(query, key, grid: TokenGrid, num_keys: int) -> list[list[bool]]:
    """The rule for one head [S, D], group by group."""
    order = frame_major(grid)
    groups = blocks_of(order, OPTIONS.stride)
    key = {token: key[token] if place < num_keys else 0 * key[token] for place, token in enumerate(order)}
    scores = torch.full((len(groups), len(groups)), -torch.inf)
    for i, queries in enumerate(groups):
        for j, keys in enumerate(groups):
            if j * OPTIONS.stride >= num_keys:
                continue
            # The last query of a whole group meets the first key.
            pairs = [(OPTIONS.stride - 1 - place, place) for place in range(len(keys))]
            products = [query[queries[a]] @ key[keys[b]] for a, b in pairs if a < len(queries)]
            scores[i, j] = sum(products) / OPTIONS.stride * 24**-0.5
    weights = scores.softmax(-1)
    rows, columns = OPTIONS.query_block_size // OPTIONS.stride, OPTIONS.key_block_size // OPTIONS.stride
    mass = [[float(part.sum()) for part in band.split(columns, dim=1)] for band in weights.split(rows, dim=0)]
    kept = always(blocks_of(order, OPTIONS.query_block_size), blocks_of(order, OPTIONS.key_block_size), grid)
    return [fewest(row, OPTIONS.mass, exact) for row, exact in zip(mass, kept)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_each_head_sees_what_the_rule_says(grid):
    query, key, value = random_qkv(grid, heads=2)
    plan = OPTIONS.plan(query * 3, key, value, AttentionCall(grid))
    for head in range(2):
        assert visible_of(plan, head=head) == expected(query[0, head] * 3, key[0, head], grid, grid.num_tokens)


def test_keys_that_do_not_exist_take_no_part():
    grid = TokenGrid(3, 5, 7, text_after=20)
    query, key, value = random_qkv(grid, batch=2, heads=1)
    key[0, :, 110:] = torch.nan
    length = torch.tensor([110, 125], dtype=torch.int32)
    plan = OPTIONS.plan(query, key, value, AttentionCall(grid, key_length=length))
    for element in range(2):
        wanted = expected(query[element, 0], key[element, 0].nan_to_num(0), grid, int(length[element]))
        assert visible_of(plan, batch=element) == wanted


def test_blocks_must_be_whole_groups():
    with pytest.raises(ValueError, match="`key_block_size` must be a multiple of `stride`, 8, got 20"):
        XAttention(key_block_size=20)

from __future__ import annotations

import pytest
import torch
from plain_rules import always, blocks_of, frame_major, highest, random_qkv, visible_of

from diffsparse import MInference
from diffsparse.grid import TokenGrid
from diffsparse.heads import sample_rows
from diffsparse.strategies.strategy import AttentionCall

OPTIONS = MInference(density=0.3, column_shares=(0.25, 0.75), sampled_rows=12, block_size=8)
SIZE = 8


def candidates(query, key, grid: TokenGrid) -> list[list[list[bool]]]:
    """The block maps that one head [S, D] has to choose from."""
    order = frame_major(grid)
    blocks = blocks_of(order, SIZE)
    count, exact = len(blocks), always(blocks, blocks, grid)
    budget = round(0.3 * count)
    a_shape = [
        highest([-abs(q - k) for k in range(count)], budget, [seen or k == 0 for k, seen in enumerate(row)])
        for q, row in enumerate(exact)
    ]
    column, diagonal = [0.0] * count, [0.0] * (2 * count - 1)
    for token in sample_rows(grid, 12).tolist():
        weights = (query[token] @ key.T * 24**-0.5).softmax(-1)
        for k, tokens in enumerate(blocks):
            column[k] += float(weights[tokens].sum())
            diagonal[k - order.index(token) // SIZE + count - 1] += float(weights[tokens].sum())
    slashes = []
    for share in (0.25, 0.75):
        width = round(share * budget)
        columns = highest(column, width, [k == 0 for k in range(count)])
        diagonals = highest(diagonal, budget - width, [d == count - 1 for d in range(2 * count - 1)])
        slashes.append(
            [
                [seen or columns[k] or diagonals[k - q + count - 1] for k, seen in enumerate(row)]
                for q, row in enumerate(exact)
            ]
        )
    means = [[x[tokens].mean(0) for tokens in blocks] for x in (query, key)]
    top = [highest([float(q @ k) for k in means[1]], budget, row) for q, row in zip(means[0], exact)]
    return [a_shape, *slashes, top]


def error(query, key, value, grid: TokenGrid, visible: list[list[bool]]) -> float:
    """What the block map costs the sampled queries of one head."""
    order = frame_major(grid)
    lost, size = 0.0, 0.0
    for token in sample_rows(grid, 12).tolist():
        scores = query[token] @ key.T * 24**-0.5
        seen = torch.tensor([visible[order.index(token) // SIZE][order.index(k) // SIZE] for k in range(len(key))])
        dense, sparse = (x.softmax(-1) @ value for x in (scores, scores.masked_fill(~seen, -torch.inf)))
        lost, size = lost + float((dense - sparse).square().sum()), size + float(dense.square().sum())
    return lost / size


@pytest.mark.parametrize("grid", [TokenGrid(3, 5, 7), TokenGrid(3, 5, 7, 2, 9)], ids=str)
def test_each_head_takes_the_pattern_that_costs_its_sampled_queries_least(grid):
    query, key, value = planted_qkv(grid)
    plan = OPTIONS.plan(query, key, value, AttentionCall(grid))
    taken = set()
    for head in range(4):
        q, k, v = (x[0, head] for x in (query, key, value))
        maps = candidates(q, k, grid)
        errors = [error(q, k, v, grid, visible) for visible in maps]
        taken.add(errors.index(min(errors)))
        assert visible_of(plan, head=head) == maps[errors.index(min(errors))]
    assert len(taken) >= 3


def planted_qkv(grid: TokenGrid):
    """Heads that look around themselves, at keys that their blocks hide, 37 places on, and where a block's twin is."""
    query, key, value = random_qkv(grid, heads=4)
    tokens = grid.num_tokens
    generator = torch.Generator().manual_seed(1)
    place = torch.linalg.qr(torch.randn(tokens, tokens, generator=generator)).Q
    walk = place.cumsum(0)
    smooth = (walk[4:] - walk[:-4])[:, :24]
    query[0, 0, 2:-2], key[0, 0, 2:-2] = 9 * smooth, 9 * smooth
    query[0, 1], key[0, 1] = 1.0, 0.1 * key[0, 1]
    for first in (16, 56, 88):
        key[0, 1, first : first + 8] += torch.tensor([1.6] + 7 * [-0.4])[:, None]
    query[0, 2] = 12 * place[:, :24]
    key[0, 2] = 12 * place.roll(37, 0)[:, :24]
    twins = torch.randn(tokens // 8 + 1, 24, generator=generator)
    query[0, 3] = 2 * twins.repeat_interleave(8, 0)[:tokens]
    key[0, 3] = 2 * twins[torch.randperm(len(twins), generator=generator)].repeat_interleave(8, 0)[:tokens]
    return query, key, value


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"`column_shares` must be a tuple of numbers from 0 to 1, got 0.5"):
        MInference(column_shares=0.5)

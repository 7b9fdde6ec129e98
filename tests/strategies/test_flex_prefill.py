from __future__ import annotations

import math

import pytest
import torch
from plain_rules import always, blocks_of, fewest, frame_major, random_qkv, visible_of

from diffsparse import FlexPrefill
from diffsparse.grid import TokenGrid
from diffsparse.heads import sample_rows
from diffsparse.strategies.flex_prefill import jensen_shannon
from diffsparse.strategies.strategy import AttentionCall

OPTIONS = FlexPrefill(mass=0.5, threshold=0.1, sampled_rows=12, block_size=8)
GRIDS = [TokenGrid(3, 5, 7), TokenGrid(3, 5, 7, 2, 9)]


def plain_divergence(p: list[float], q: list[float]) -> float:
    both = [(a, b, (a + b) / 2) for a, b in zip(p, q)]
    return sum((a * math.log(a / m) if a else 0) + (b * math.log(b / m) if b else 0) for a, b, m in both) / 2


def expected(query, key, grid: TokenGrid) -> tuple[bool, list[list[bool]]]:
    """Whether one head [S, D] goes by its pooled map, and what it sees."""
    order = frame_major(grid)
    blocks = blocks_of(order, 8)
    count = len(blocks)
    exact = [[seen or k == 0 for k, seen in enumerate(row)] for row in always(blocks, blocks, grid)]
    rows = sample_rows(grid, 12).tolist()
    column, diagonal = [0.0] * count, [0.0] * (2 * count - 1)
    for token in rows:
        weights = (query[token] @ key.T * 24**-0.5).softmax(-1)
        for k, tokens in enumerate(blocks):
            column[k] += float(weights[tokens].sum()) / 12
            diagonal[k - order.index(token) // 8 + count - 1] += float(weights[tokens].sum()) / 12
    means = [torch.stack([x[tokens].mean(0) for tokens in blocks]) for x in (query, key)]
    sizes = torch.tensor([float(len(tokens)) for tokens in blocks])
    estimate = (query[rows].mean(0) @ means[1].T * 24**-0.5 + sizes.log()).softmax(-1)
    if math.sqrt(plain_divergence(estimate.tolist(), column)) < 0.1:
        mass = (means[0] @ means[1].T * 24**-0.5).softmax(-1).flatten().tolist()
        flat = fewest(mass, 0.5, [seen for row in exact for seen in row])
        return True, [flat[first : first + count] for first in range(0, count * count, count)]
    columns, diagonals = (fewest(mass, 0.5, [False] * len(mass)) for mass in (column, diagonal))
    return False, [
        [seen or columns[k] or diagonals[k - q + count - 1] for k, seen in enumerate(row)]
        for q, row in enumerate(exact)
    ]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_each_head_goes_by_its_pooled_map_or_by_columns_and_diagonals(grid):
    """Two heads whose attention is nearly flat, which pooling describes well, and two that pick single keys."""
    query, key, value = random_qkv(grid, heads=4)
    query = query * torch.tensor([0.2, 0.5, 3.0, 6.0])[:, None, None]
    plan = OPTIONS.plan(query, key, value, AttentionCall(grid))
    wanted = [expected(query[0, head], key[0, head], grid) for head in range(4)]
    assert {pooled for pooled, _ in wanted} == {True, False}
    assert [visible_of(plan, head=head) for head in range(4)] == [visible for _, visible in wanted]


def test_the_divergence_is_that_of_the_definition_and_knows_zero():
    p, q = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.2, 0.0, 0.8, 0.0])
    assert float(jensen_shannon(p, q)) == pytest.approx(plain_divergence(p.tolist(), q.tolist()), rel=1e-6)
    assert float(jensen_shannon(p, p)) == 0
    assert float(jensen_shannon(p[:2], torch.tensor([0.0, 1.0]))) < math.log(2)

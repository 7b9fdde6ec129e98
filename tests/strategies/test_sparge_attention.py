from __future__ import annotations

import pytest
import torch
from plain_rules import always, blocks_of, fewest, frame_major, highest, order_of, random_qkv, visible_of

from diffsparse import SpargeAttention
from diffsparse.grid import TokenGrid
from diffsparse.strategies.strategy import AttentionCall

GRIDS = [TokenGrid(3, 5, 7), TokenGrid(3, 5, 7, 2, 9)]
BLOCKS = {"query_block_size": 16, "key_block_size": 8}


def half_alike_qkv(grid: TokenGrid):
    """Queries and keys of which every other run of 24 tokens points into nearly one direction."""
    query, key, value = random_qkv(grid)
    alike = (torch.arange(grid.num_tokens) // 24 % 2 == 0)[:, None]
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(2, 3, grid.num_tokens // 24 + 1, 24, generator=generator).repeat_interleave(24, dim=2)
    for x, shared in zip((query, key), direction):
        x += 5 * alike * shared[:, : grid.num_tokens]
    return query, key, value


def mean_cosine(tokens: torch.Tensor) -> float:
    directions = tokens / tokens.norm(dim=-1, keepdim=True)
    return float((directions @ directions.T).mean())


def expected(query, key, grid: TokenGrid, options: SpargeAttention) -> list[list[bool]]:
    """The rule for one head [S, D], in the order that the paper gives it."""
    order = frame_major(grid)
    key = key - key.mean(0)
    queries, keys = blocks_of(order, options.query_block_size), blocks_of(order, options.key_block_size)
    kept = always(queries, keys, grid)
    trusted = [mean_cosine(key[tokens]) > options.similarity for tokens in keys]
    rows = []
    for row, tokens in enumerate(queries):
        scores = torch.stack([query[tokens].mean(0) @ key[others].mean(0) for others in keys]) * 24**-0.5
        scores[~torch.tensor(trusted)] = -torch.inf
        mass = scores.softmax(0).tolist()
        if options.density is None:
            visible = fewest(mass, options.mass, kept[row])
        else:
            visible = highest(scores.tolist(), round(options.density * len(keys)), kept[row])
        if mean_cosine(query[tokens]) <= options.similarity:
            visible = [True] * len(keys)
        rows.append([seen or not trust for seen, trust in zip(visible, trusted)])
    return rows


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    "options",
    [SpargeAttention(mass=0.6, similarity=0.5, **BLOCKS), SpargeAttention(density=0.3, similarity=-0.1, **BLOCKS)],
)
def test_each_head_sees_what_the_rule_says(grid, options):
    query, key, value = half_alike_qkv(grid)
    plan = options.plan(query, key, value, AttentionCall(grid))
    assert order_of(plan, grid) == frame_major(grid)
    for head in range(3):
        assert visible_of(plan, head=head) == expected(query[0, head], key[0, head], grid, options)


def test_blocks_that_pooling_cannot_judge_are_kept():
    grid = TokenGrid(3, 8, 8)
    query, key, value = random_qkv(grid)
    dense = SpargeAttention(mass=0.3, similarity=0.5, **BLOCKS).plan(query, key, value, AttentionCall(grid))
    assert dense.mask.visible().all()
    sparse = SpargeAttention(mass=0.3, similarity=-1, **BLOCKS).plan(query, key, value, AttentionCall(grid))
    assert sparse.mask.density.max() < 0.5


def test_an_offset_of_all_keys_changes_nothing():
    query, key, value = half_alike_qkv(GRIDS[1])
    options = SpargeAttention(mass=0.6, similarity=0.5, **BLOCKS)
    plain, shifted = (options.plan(query, x, value, AttentionCall(GRIDS[1])) for x in (key, key + 3.0))
    assert torch.equal(plain.mask.visible(), shifted.mask.visible())


@pytest.mark.parametrize(
    ("option", "value"),
    [("mass", 1.5), ("density", 0), ("similarity", 2), ("query_block_size", 0), ("key_block_size", 8.0)],
)
def test_an_option_out_of_range_is_named(option, value):
    with pytest.raises(ValueError, match=f"`{option}` must be .* got {value}"):
        SpargeAttention(**{option: value})

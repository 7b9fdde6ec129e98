from __future__ import annotations

import pytest
import torch

from diffsparse import VMoBA
from diffsparse.grid import TokenGrid
from diffsparse.strategies.chunk_selection import best_by_number, best_by_threshold
from diffsparse.strategies.strategy import AttentionCall

GRID = TokenGrid(5, 6, 7)  # chunks of 2 frames, 3 x 4 places and boxes are all ragged
OPTIONS = {"box_chunk": (2, 4, 4), "top_k": (2, 2, 3)}
KINDS = ["frames", "places", "boxes"]


def chunk_of(token: int, kind: int) -> tuple[int, ...]:
    frame, row, column = token // 42, token % 42 // 7, token % 7
    return ((frame // 2,), (row // 3, column // 4), (frame // 2, row // 4, column // 4))[kind]


def selected_tokens(query: torch.Tensor, key: torch.Tensor, kind: int, options: VMoBA) -> torch.Tensor:
    """Which keys each query of one head sees, [S, S] bool, token by token; query and key [S, D]."""
    chunks = sorted({chunk_of(token, kind) for token in range(210)})
    members = [[token for token in range(210) if chunk_of(token, kind) == chunk] for chunk in chunks]
    gates = query @ torch.stack([key[tokens].mean(0) for tokens in members]).T
    own = torch.tensor([[chunk_of(token, kind) == chunk for chunk in chunks] for token in range(210)])
    select, setting = best_by_threshold, options.threshold
    if options.select == "top-k":
        select, setting = best_by_number, options.top_k[kind]
    if options.scope == "head-global":
        setting = setting if options.select == "threshold" else setting * 210
        selected = select(gates.flatten(), own.flatten(), setting).view_as(own)
    else:
        selected = select(gates, own, setting)
    seen = torch.zeros(210, 210, dtype=torch.bool)
    for number, tokens in enumerate(members):
        seen[:, tokens] = selected[:, number, None]
    return seen


def executed_tokens(plan, head: int) -> torch.Tensor:
    """Which keys each query sees, [S, S] bool, of a plan with query blocks of one token."""
    place = plan.permutation.order[0].argsort()
    return plan.mask.visible()[0, head][place][:, place // plan.mask.key_block_size]


@pytest.mark.parametrize("kind", range(3), ids=KINDS)
@pytest.mark.parametrize("select", ["threshold", "top-k"])
@pytest.mark.parametrize("scope", ["query-head", "head-global"])
def test_with_blocks_of_one_token_it_is_the_rule_to_the_letter(kind, select, scope):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 210, 16).unbind()
    for routing in ("mean", "union"):
        options = VMoBA(select=select, scope=scope, routing=routing, query_block_size=1, key_block_size=1, **OPTIONS)
        plan = options.plan(query, key, value, AttentionCall(GRID, layer=3 + kind, num_layers=9))
        for head in range(2):
            expected = selected_tokens(query[0, head], key[0, head], kind, options)
            assert torch.equal(executed_tokens(plan, head), expected)


def test_the_union_sees_what_any_of_its_tokens_selects():
    query, key, value = torch.randn(3, 1, 1, 210, 16).unbind()
    options = VMoBA(routing="union", query_block_size=16, key_block_size=1, **OPTIONS)
    for kind in range(3):
        plan = options.plan(query, key, value, AttentionCall(GRID, layer=kind))
        by_token = selected_tokens(query[0, 0], key[0, 0], kind, options)
        order = plan.permutation.order[0]
        expected = torch.stack([by_token[tokens].any(0)[order] for tokens in order.split(16)])
        assert torch.equal(plan.mask.visible()[0, 0], expected)


@pytest.mark.parametrize("routing", ["mean", "union"])
def test_every_block_sees_its_own_chunks(routing):
    query, key, value = torch.randn(3, 1, 2, 210, 16).unbind()
    options = VMoBA(routing=routing, query_block_size=16, key_block_size=1, threshold=0.0, **OPTIONS)
    for kind in range(3):
        plan = options.plan(query, key, value, AttentionCall(GRID, layer=kind))
        order = plan.permutation.order[0].tolist()
        for block, seen in enumerate(plan.mask.visible()[0, 0].tolist()):
            own = {chunk_of(token, kind) for token in order[block * 16 : block * 16 + 16]}
            assert all(is_seen for is_seen, token in zip(seen, order) if chunk_of(token, kind) in own)


def test_key_blocks_keep_the_density_of_the_chunks():
    """A block of keys is seen by half of it: its ends are off by half a block each, and as often wide as narrow."""
    torch.manual_seed(0)
    grid = TokenGrid(4, 12, 16)
    query, key, value = torch.randn(3, 1, 8, grid.num_tokens, 16).unbind()
    densities = [
        VMoBA(places_chunk=(5, 6), key_block_size=size, query_block_size=1)
        .plan(query, key, value, AttentionCall(grid, layer=1))
        .mask.density.mean()
        for size in (1, 16)
    ]
    chunks_selected = densities[0] * 9
    assert abs(densities[1] - densities[0]) < chunks_selected * 16 / grid.num_tokens


@pytest.mark.parametrize("wrong", [{"select": "all"}, {"scope": "block"}, {"threshold": 2}, {"top_k": (1, 2)}])
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VMoBA(**wrong)

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plain_rules import always, blocks_of, highest, is_text, random_qkv, visible_of

from diffsparse import MMInference
from diffsparse.grid import TokenGrid
from diffsparse.strategies.strategy import AttentionCall

OPTIONS = MMInference(density=0.3, sampled_rows=24, query_block_size=8, key_block_size=8)


def lattice_qkv(grid: TokenGrid, strides: list[int]):
    """Heads that look at the tokens a whole number of strides away; of stride 1, at those in the same seven."""
    query, key, value = random_qkv(grid, heads=len(strides), dim=64)
    generator = torch.Generator().manual_seed(1)
    for head, stride in enumerate(strides):
        place = torch.arange(grid.num_video_tokens)
        phase = place % stride if stride > 1 else place // 7
        direction = torch.nn.functional.normalize(torch.randn(int(phase.max()) + 1, 64, generator=generator), dim=-1)
        for x in (query, key):
            x[0, head, grid.text_before :][: grid.num_video_tokens] = 12 * direction[phase]
    return query, key, value


@pytest.mark.parametrize("grid", [TokenGrid(6, 5, 7), TokenGrid(6, 5, 7, 2, 9)], ids=str)
def test_each_head_finds_its_lattice(grid):
    strides = [1, 7, 35]
    query, key, value = lattice_qkv(grid, strides)
    plan = OPTIONS.plan(query, key, value, AttentionCall(grid))
    for head, stride in enumerate(strides):
        order = plan.permutation.order[head].tolist()
        video = [token for token in range(grid.num_tokens) if not is_text(token, grid)]
        text = [token for token in range(grid.num_tokens) if is_text(token, grid)]
        assert order == sorted(video, key=lambda token: ((token - grid.text_before) % stride, token)) + text
    dense = F.scaled_dot_product_attention(query, key, value)
    assert (plan.attend(query, key, value) - dense).norm() < 0.1 * dense.norm()


@pytest.mark.parametrize("grid", [TokenGrid(6, 5, 7), TokenGrid(6, 5, 7, 2, 9)], ids=str)
def test_a_query_block_sees_the_blocks_nearest_to_it_in_the_order(grid):
    plan = OPTIONS.plan(*random_qkv(grid), AttentionCall(grid))
    blocks = blocks_of(plan.permutation.order[0].tolist(), 8)
    budget = round(0.3 * len(blocks))
    for q, exact in enumerate(always(blocks, blocks, grid)):
        seen = visible_of(plan)[q]
        near = highest([-abs(q - k) for k in range(len(blocks))], budget, exact)
        assert sum(seen) == sum(near)
        # Of two blocks equally near either may be taken.
        assert sorted(abs(q - k) for k, see in enumerate(seen) if see) == sorted(
            abs(q - k) for k, see in enumerate(near) if see
        )


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"`strides` must be a tuple of tokens, like \(1, 80, 3600\), got 7"):
        MMInference(strides=7)
    with pytest.raises(ValueError, match="`strides` must be an integer of at least 1, got 0"):
        MMInference(strides=(1, 0))

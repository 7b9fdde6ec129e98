from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from plain_rules import random_qkv

from diffsparse import SVG2, SVOO
from diffsparse.grid import TokenGrid
from diffsparse.strategies import planning_memory
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.svoo import nearest_profile, needed_share

GRID = TokenGrid(3, 5, 7, 2, 9)
SIZES = {"query_block_size": 16, "key_block_size": 8}


def test_a_token_goes_to_the_centroid_whose_scores_have_the_same_direction(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    tokens, centroids, others = (torch.randn(2, 3, n, 12, generator=generator) for n in (30, 5, 4))
    labels = nearest_profile(tokens, centroids, others)
    for head in range(3):
        for token in range(30):
            mine, *theirs = (
                torch.cat([others[element, head] @ x[element, head, place] for element in range(2)])
                for x, place in ((tokens, token), *((centroids, number) for number in range(5)))
            )
            cosines = [float(F.cosine_similarity(mine, one, dim=0)) for one in theirs]
            assert int(labels[head, token]) == cosines.index(max(cosines))
    monkeypatch.setattr(planning_memory, "PLANNING_BYTES", 1)
    assert torch.equal(nearest_profile(tokens, centroids, others), labels)


def test_the_share_of_keys_that_a_query_needs():
    """Weights of 1/2, 1/4, 1/8 …: 95 % of them are in the first five of seven."""
    key = torch.zeros(1, 2, 10, 4)
    key[0, 0, :7, 0] = -math.log(2) * torch.tensor([2.0, 0, 3, 1, 5, 4, 6])
    key[0, :, 7:] = torch.nan
    query = torch.tensor([1.0, 0, 0, 0]).expand(1, 2, 3, 4)
    shares = needed_share(query, key, 0.95, torch.tensor([7], dtype=torch.int32))
    # The second head's keys are all alike: seven of seven.
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.7]))


def test_a_head_that_needs_more_sees_more_within_the_bounds():
    query, key, value = random_qkv(GRID)
    query[:, 0] = 0  # looks at everything
    query[:, 1] = 20 * key[:, 1]  # each at itself
    densities = {
        (least, most): SVOO(
            query_clusters=6, key_clusters=12, mass=0.0, least=least, most=most, sampled_rows=99, **SIZES
        )
        .plan(query, key, value, AttentionCall(GRID))
        .mask.visible()[0, :, 0]
        .sum(-1)
        .tolist()
        for least, most in ((0.0, 1.0), (0.3, 0.6), (0.4, 0.4))
    }
    blocks = -(-GRID.num_tokens // 8)
    free = densities[0.0, 1.0]
    # Text is exact, and two of the blocks hold some.
    assert free[0] == int(0.95 * blocks) > free[2] > free[1] >= 2
    assert densities[0.3, 0.6][:2] == [int(0.6 * blocks), int(0.3 * blocks)]
    assert densities[0.4, 0.4] == [int(0.4 * blocks)] * 3


def test_queries_that_attend_alike_lie_together_though_they_differ():
    """Eight groups of queries, each with its own part that no key scores with, at three times the size."""
    grid = TokenGrid(8, 8, 8)
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(512)[torch.randperm(512, generator=generator)] % 8
    axes = torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q
    key = 9 * axes[(group + 3) % 8]
    unseen = torch.randn(512, 16, generator=generator) @ axes[8:]
    query = axes[group] + 3 * F.normalize(unseen, dim=-1)
    value = torch.randn(512, 24, generator=generator)
    query, key, value = (x[None, None] for x in (9 * query, key, value))
    dense = F.scaled_dot_product_attention(query, key, value)
    options = {"query_clusters": 32, "key_clusters": 32, "least": 0.0, "query_block_size": 16, "key_block_size": 16}
    densities, errors = [], []
    for strategy in (SVOO(most=0.0, **options), SVG2(**options)):
        plan = strategy.plan(query, key, value, AttentionCall(grid))
        densities.append(float(plan.mask.density))
        errors.append(float((plan.attend(query, key, value) - dense).norm() / dense.norm()))
    # 4 of 32 key blocks hold a group; a query block where two groups meet may see both, or one alone.
    assert densities[0] < 5 / 32 < densities[1] / 2
    assert errors[0] < 0.3 < errors[1] / 2


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"`least` must be at most `most`, got 0\.3 and 0\.2"):
        SVOO(least=0.3)
    with pytest.raises(ValueError, match="`iterations` must be an integer of at least 1, got 0"):
        SVOO(iterations=0)

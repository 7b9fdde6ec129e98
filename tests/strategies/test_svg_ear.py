from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from plain_rules import is_text, random_qkv

from diffsparse import SVG2, SVGEAR
from diffsparse.grid import TokenGrid
from diffsparse.strategies.clustered_tokens import Clusters
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.svg_ear import errors_of_means

GRID = TokenGrid(4, 8, 10, 2, 9)
SIZES = {"query_block_size": 16, "key_block_size": 8}
OPTIONS = SVGEAR(query_clusters=5, key_clusters=9, mass=0.5, least=0.2, iterations=3, **SIZES)


@pytest.mark.parametrize("length", [None, 21])
def test_errors_are_those_of_weighted_values_and_their_means(length):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 12, generator=generator).double() for n in (4, 30, 30))
    exists = 30 if length is None else length
    given = value.clone()
    given[:, :, exists:] = torch.nan
    key_length = None if length is None else torch.full((2,), length, dtype=torch.int32)
    actual = errors_of_means(query.float(), key.float(), given.float(), 8, key_length)
    weights = (query @ key[:, :, :exists].mT).exp()
    for number in range(4):
        keys = range(8 * number, min(8 * number + 8, exists))
        expected = torch.zeros(2, 3, 4, dtype=torch.float64)
        for one in keys:
            mean_key, mean_value = (x[:, :, keys.start : keys.stop].mean(2, keepdim=True) for x in (key, value))
            mean_weight = (query @ mean_key.mT).exp()
            difference = weights[..., one, None] * value[:, :, None, one] - mean_weight * mean_value
            expected += difference.square().sum(-1)
        torch.testing.assert_close(actual[..., number].double(), expected / weights.sum(-1) ** 2, rtol=1e-4, atol=1e-9)


def test_as_many_blocks_as_svg2_would_see_and_those_that_err_most():
    query, key, value = (x * scale for x, scale in zip(random_qkv(GRID), (3, 3, 1)))
    plan = OPTIONS.plan(query, key, value, AttentionCall(GRID))
    by_mass = SVG2(query_clusters=5, key_clusters=9, mass=0.5, least=0.4, iterations=3, **SIZES)
    other = by_mass.plan(query, key, value, AttentionCall(GRID))
    few = dataclasses.replace(by_mass, mass=0.0, least=0.2).plan(query, key, value, AttentionCall(GRID))
    assert torch.equal(plan.permutation.order, other.permutation.order)
    assert torch.equal(plan.key_permutation.order, other.key_permutation.order)
    # Of blocks with as much mass SVG2 may see another one by each of its two rules.
    assert set((other.mask.counts - plan.mask.counts).unique().tolist()) <= {0, 1}
    assert (plan.mask.visible() >= few.mask.visible()).all()
    assert not torch.equal(plan.mask.visible(), other.mask.visible())
    # A block of queries of one cluster, held against its mean query: what it leaves out errs less than what it sees.
    checked = 0
    for head in range(3):
        order = plan.permutation.order[head].tolist()
        centroids, labels = centroids_of(query[0, head], OPTIONS.query_clusters)
        in_order = [x[:, head, plan.key_permutation.order[head]][:, None] for x in (key, value)]
        errors = errors_of_means(centroids[None, None] * 24**-0.5, *in_order, 8)[0, 0]
        for block in range(plan.mask.visible().shape[2]):
            tokens = order[16 * block : 16 * block + 16]
            if any(is_text(token, GRID) for token in tokens) or len({labels[token] for token in tokens}) > 1:
                continue
            seen, sure = (one.mask.visible()[0, head, block] for one in (plan, few))
            row = errors[labels[tokens[0]]]
            assert row[~seen].max() <= row[seen & ~sure].min()
            checked += 1
    assert checked


def centroids_of(x, count: int):
    """The centroids of one head's video queries [S, D], and the cluster of each token."""
    clusters = Clusters.of_video(x[None, None], GRID, count, OPTIONS.iterations, OPTIONS.seed)
    labels = {token + GRID.text_before: int(label) for token, label in enumerate(clusters.labels[0])}
    return clusters.centroids[0, 0], labels


def test_with_the_means_its_output_is_closer_than_that_of_what_holds_most_mass():
    """Keys of which some agree among themselves in blocks, and others, that hold less, do not."""
    grid = TokenGrid(8, 8, 8)
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(512) % 16
    axes = torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q
    spread = torch.where(group < 8, 0.05, 2.0)[:, None]
    key = 3 * axes[group] + spread * torch.randn(512, 24, generator=generator)
    value = axes[group] + spread * torch.randn(512, 24, generator=generator)
    query = 4 * axes[:8].sum(0) + 2 * torch.randn(512, 24, generator=generator)
    query, key, value = (x[None, None] for x in (query, key, value))
    dense = F.scaled_dot_product_attention(query, key, value)
    options = {"query_clusters": 8, "key_clusters": 32, **SIZES}
    ours, theirs = (
        strategy.plan(query, key, value, AttentionCall(grid))
        for strategy in (SVGEAR(least=0.05, **options), SVG2(least=0.1, **options))
    )
    theirs = dataclasses.replace(theirs, tail=ours.tail)
    assert torch.equal(ours.mask.counts, theirs.mask.counts)
    errors = [(plan.attend(query, key, value) - dense).norm() / dense.norm() for plan in (ours, theirs)]
    assert errors[0] < 0.7 * errors[1]


def test_what_is_not_seen_enters_as_its_mean_unless_it_is_told_not_to():
    qkv = random_qkv(GRID)
    assert OPTIONS.plan(*qkv, AttentionCall(GRID)).tail.all()
    assert dataclasses.replace(OPTIONS, tail=False).plan(*qkv, AttentionCall(GRID)).tail is None


def test_options_are_checked():
    with pytest.raises(ValueError, match="`mass` must be a number from 0 to 1, got 2"):
        SVGEAR(mass=2)
    with pytest.raises(ValueError, match="`tail` must be True or False, got None"):
        SVGEAR(tail=None)

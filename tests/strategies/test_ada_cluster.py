from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from plain_rules import is_text, qkv_of_groups, random_qkv, visible_of

from diffsparse import AdaCluster
from diffsparse.grid import TokenGrid
from diffsparse.heads import sample_rows
from diffsparse.strategies.ada_cluster import cluster_bounds, clusters_by_stages, highest_scores
from diffsparse.strategies.k_means import cluster_sizes
from diffsparse.strategies.strategy import AttentionCall

GRIDS = [TokenGrid(3, 5, 7), TokenGrid(3, 5, 7, 2, 9)]
SIZES = {"query_block_size": 16, "key_block_size": 8}
OPTIONS = AdaCluster(density=0.35, query_clusters=5, key_clusters=6, stages=3, threshold=1.1, **SIZES)


def plain_clusters(x, start: list[int], stages: int, threshold: float, iterations: int):
    """Stage and cluster of each token of x [S, F], one by one; centroids by the same; who is far in the end."""
    found, centroids, far, most = {}, {}, list(range(len(x))), None
    for stage in range(stages):
        centres = [x[far[place * len(far) // len(x)]] for place in start] if far else []
        for move in range(iterations + 1):
            distances = {token: [float((x[token] - centre).norm()) for centre in centres] for token in far}
            near = {token: distances[token].index(min(distances[token])) for token in far}
            if move < iterations:
                for c in set(near.values()):
                    centres[c] = torch.stack([x[token] for token in far if near[token] == c]).mean(0)
        distance = {token: min(distances[token]) for token in far}
        if most is None:
            most = threshold * sum(distance.values()) / len(x)
        centroids |= {(stage, cluster): centre for cluster, centre in enumerate(centres)}
        found |= {token: (stage, cluster) for token, cluster in near.items()}
        far = [token for token in far if distance[token] > most]
    return found, centroids, far


def test_keys_far_from_their_centroid_form_clusters_of_their_own():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 60, 3, generator=generator)
    x[1, ::7] *= 4
    start = torch.tensor([1, 22, 30, 49])
    for stages, threshold in ((1, 1.0), (2, 1.0), (4, 1.2), (6, 1.2)):
        labels, centroids, is_far = clusters_by_stages(x, start, stages, threshold, 2)
        assert centroids.shape == (2, stages * 4, 3)
        for head in range(2):
            found, _, far = plain_clusters(x[head], start.tolist(), stages, threshold, 2)
            assert [divmod(label, 4) for label in labels[head].tolist()] == [found[token] for token in range(60)]
            assert is_far[head].nonzero()[:, 0].tolist() == far
    # The last case is one where later stages had something to do, and then nothing.
    assert labels.max() >= 8
    assert not is_far.any()


def test_a_head_has_as_many_clusters_as_its_keys_need():
    """Four groups far apart; in the second head three keys that are far from all of them, and from one another."""
    generator = torch.Generator().manual_seed(0)
    x = (20 * torch.eye(4)[torch.arange(40) % 4] + torch.randn(40, 4, generator=generator)).repeat(2, 1, 1)
    x[1, [10, 21, 32]] *= 5
    labels, _, is_far = clusters_by_stages(x, torch.tensor([0, 11, 22, 33]), 3, 2.5, 2)
    assert set(labels[0].tolist()) == {0, 1, 2, 3}
    assert len(set(labels[1].tolist())) == 4 + 3
    assert len(set(labels[1, [10, 21, 32]].tolist()) - {0, 1, 2, 3}) == 3
    assert not is_far.any()


def test_keys_that_are_equal_are_not_far_from_one_another():
    """Their mean is not quite equal to them, so that some are more than the mean distance away."""
    x = torch.randn(1, 3, 7, generator=torch.Generator().manual_seed(0))[:, torch.arange(60) % 3]
    _, centroids, is_far = clusters_by_stages(x, torch.tensor([0, 19, 41]), 1, 1.0, 3)
    assert not torch.equal(centroids[0].sort(0).values, x[0, :3].sort(0).values)
    assert not is_far.any()


def test_scores_are_those_of_the_best_key_that_the_bounds_allow():
    generator = torch.Generator().manual_seed(0)
    x, query = torch.randn(2, 30, 5, generator=generator), torch.randn(1, 2, 4, 5, generator=generator)
    labels = torch.randint(0, 3, (2, 30), generator=generator)
    least, most = cluster_bounds(x, labels, cluster_sizes(labels, 4))
    scores = highest_scores(query, least[None], most[None])
    for head in range(2):
        for cluster in range(3):
            keys = x[head][labels[head] == cluster].tolist()
            for row in range(4):
                quest = sum(
                    max(q * max(key[d] for key in keys), q * min(key[d] for key in keys))
                    for d, q in enumerate(query[0, head, row].tolist())
                )
                assert float(scores[0, head, row, cluster]) == pytest.approx(quest, rel=1e-5, abs=1e-5)
    # The last one is empty.
    assert (scores[..., 3] == 0).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_are_chosen_by_the_scores_of_their_tokens_clusters(grid):
    query, key, value = random_qkv(grid)
    plan = OPTIONS.plan(query, key, value, AttentionCall(grid))
    video = range(grid.text_before, grid.text_before + grid.num_video_tokens)
    starts = {count: (sample_rows(grid, count) - grid.text_before).tolist() for count in (5, 6)}
    seen_whole = 0
    for head in range(3):
        directions = query[0, head] / query[0, head].norm(dim=-1, keepdim=True)
        query_label, centres, _ = plain_clusters(directions[video], starts[5], 1, math.inf, OPTIONS.iterations)
        key_label, _, far = plain_clusters(key[0, head][video], starts[6], 3, 1.1, OPTIONS.iterations)
        query_label, key_label = (
            {token + grid.text_before: label for token, label in labels.items()} for labels in (query_label, key_label)
        )
        query_order, key_order = plan.permutation.order[head].tolist(), plan.key_permutation.order[head].tolist()
        for order, label in ((query_order, query_label), (key_order, key_label)):
            assert order[: len(label)] == sorted(label, key=lambda token: (label[token], token))
            assert all(is_text(token, grid) for token in order[len(label) :])

        score = {}
        for q in set(query_label.values()):
            for k in set(key_label.values()):
                keys = key[0, head][[token for token in video if key_label[token] == k]]
                score[q, k] = float(torch.maximum(centres[q] * keys.amax(0), centres[q] * keys.amin(0)).sum())
        visible = visible_of(plan, head=head)
        seen_whole += bool(far)
        for row, first in enumerate(range(0, grid.num_tokens, 16)):
            queries = [token for token in query_order[first : first + 16] if not is_text(token, grid)]
            scores, others = [], []
            for column, other in enumerate(range(0, grid.num_tokens, 8)):
                keys = [token for token in key_order[other : other + 8] if not is_text(token, grid)]
                if far or len(queries) < len(query_order[first:][:16]) or len(keys) < len(key_order[other:][:8]):
                    assert visible[row][column]
                    continue
                pairs = [score[query_label[q], key_label[k]] for q in queries for k in keys]
                (scores if visible[row][column] else others).append(sum(pairs) / len(pairs))
            if others:
                assert sum(visible[row]) == math.ceil(0.35 * len(visible[row]))
                # Blocks within a cluster have the same.
                assert min(scores) > max(others) - 1e-5
    assert seen_whole < 3  # of 3 heads


def test_groups_of_tokens_that_attend_to_one_another_are_found_at_their_density():
    grid, (query, key, value) = qkv_of_groups()
    # Lengths differ by powers of two, which are exact: or queries of a group would be of two directions, and a block
    # hold two groups.
    query = query * 2.0 ** torch.randint(0, 3, (1, 1, 512, 1), generator=torch.Generator().manual_seed(0))
    options = AdaCluster(density=4 / 32, query_clusters=32, key_clusters=32, query_block_size=16, key_block_size=16)
    plan = options.plan(query, key, value, AttentionCall(grid))
    # 4 of 32 key blocks hold a group.
    assert float(plan.mask.density) == 4 / 32
    dense = F.scaled_dot_product_attention(query, key, value)
    assert (plan.attend(query, key, value) - dense).norm() < 0.01 * dense.norm()


def test_a_head_whose_keys_are_scattered_sees_everything():
    grid = GRIDS[0]
    query, key, value = random_qkv(grid)
    # In the other two heads each key is one of three, and stays near to its centroid.
    key[:, :2] = key[:, :2, torch.arange(105) % 3]
    options = AdaCluster(density=0.2, key_clusters=6, stages=2, threshold=0.5, **SIZES)
    density = options.plan(query, key, value, AttentionCall(grid)).mask.density
    assert density[2] == 1
    assert (density[:2] < 0.3).all()


def test_the_length_of_a_query_changes_nothing():
    """Powers of two are exact, so that all that follows from the directions is the same."""
    grid = GRIDS[1]
    query, key, value = random_qkv(grid)
    lengths = 2.0 ** torch.randint(-3, 4, (1, 3, grid.num_tokens, 1), generator=torch.Generator().manual_seed(1))
    plan, other = (OPTIONS.plan(x, key, value, AttentionCall(grid)) for x in (query, query * lengths))
    assert torch.equal(plan.permutation.order, other.permutation.order)
    assert torch.equal(plan.mask.visible(), other.mask.visible())


def test_each_element_of_a_batch_has_its_own_choice_in_shared_clusters():
    grid = GRIDS[1]
    query, key, value = random_qkv(grid, batch=2)
    # Of equal length both count alike.
    query[1] *= 2**20
    plan = AdaCluster(query_clusters=5, **SIZES).plan(query, key, value, AttentionCall(grid))
    assert plan.permutation.order.shape == (3, grid.num_tokens)
    assert not torch.equal(plan.mask.visible()[0], plan.mask.visible()[1])
    query[1] /= 2**20
    same = AdaCluster(query_clusters=5, **SIZES).plan(query, key, value, AttentionCall(grid))
    assert torch.equal(plan.permutation.order, same.permutation.order)


def test_options_are_checked():
    with pytest.raises(ValueError, match="`stages` must be an integer of at least 1, got 0"):
        AdaCluster(stages=0)
    with pytest.raises(ValueError, match=r"`threshold` must be a number from 0 to inf, got -1\.0"):
        AdaCluster(threshold=-1.0)

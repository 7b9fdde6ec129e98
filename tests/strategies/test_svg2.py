from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from plain_rules import fewest, highest, is_text, qkv_of_groups, random_qkv, visible_of

from diffsparse import SVG2
from diffsparse.grid import TokenGrid
from diffsparse.heads import sample_rows
from diffsparse.strategies.k_means import k_means
from diffsparse.strategies.strategy import AttentionCall

GRIDS = [TokenGrid(3, 5, 7), TokenGrid(3, 5, 7, 2, 9)]
OPTIONS = SVG2(
    query_clusters=5, key_clusters=9, mass=0.5, least=0.2, iterations=3, query_block_size=16, key_block_size=8
)


def clusters(x, grid: TokenGrid, count: int):
    """The cluster of each video token of one head [S, D], and the mean of each cluster."""
    video = x[grid.text_before :][: grid.num_video_tokens]
    start = x[sample_rows(grid, count)]
    labels, centroids, _ = k_means(video[None], start[None], OPTIONS.iterations)
    return {token + grid.text_before: int(label) for token, label in enumerate(labels[0])}, centroids[0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_have_the_mass_that_the_centroids_give_their_tokens(grid):
    query, key, value = (x * scale for x, scale in zip(random_qkv(grid), (3, 3, 1)))
    plan = OPTIONS.plan(query, key, value, AttentionCall(grid))
    for head in range(3):
        query_label, query_centre = clusters(query[0, head], grid, 5)
        key_label, key_centre = clusters(key[0, head], grid, 9)
        query_order, key_order = plan.permutation.order[head].tolist(), plan.key_permutation.order[head].tolist()
        for order, label in ((query_order, query_label), (key_order, key_label)):
            assert order[: len(label)] == sorted(label, key=lambda token: (label[token], token))
            assert all(is_text(token, grid) for token in order[len(label) :])
        weight = [
            {token: math.exp(float(centre @ key_centre[k]) * 24**-0.5) for token, k in key_label.items()}
            for centre in query_centre
        ]
        wanted = []
        for first in range(0, grid.num_tokens, 16):
            queries = [token for token in query_order[first : first + 16] if not is_text(token, grid)]
            mass, exact = [], []
            for other in range(0, grid.num_tokens, 8):
                keys = [token for token in key_order[other : other + 8] if not is_text(token, grid)]
                parts = [
                    sum(weight[query_label[q]][k] for k in keys) / sum(weight[query_label[q]].values()) for q in queries
                ]
                mass.append(sum(parts) / max(1, len(queries)))
                text = len(queries) < len(query_order[first : first + 16]) or len(keys) < len(key_order[other:][:8])
                exact.append(text)
            least = highest(mass, int(0.2 * len(mass)), exact)
            wanted.append([a or b for a, b in zip(fewest(mass, 0.5, exact), least)])
        assert visible_of(plan, head=head) == wanted


def test_groups_of_tokens_that_attend_to_one_another_are_found_at_their_density():
    """Each group attends to an eighth of the keys."""
    grid, (query, key, value) = qkv_of_groups()
    options = SVG2(query_clusters=32, key_clusters=32, least=0.0, query_block_size=16, key_block_size=16)
    plan = options.plan(query, key, value, AttentionCall(grid))
    # 4 of 32 key blocks hold a group.
    assert float(plan.mask.density) == 4 / 32
    dense = F.scaled_dot_product_attention(query, key, value)
    assert (plan.attend(query, key, value) - dense).norm() < 0.05 * dense.norm()


def test_each_element_of_a_batch_has_its_own_choice_in_shared_clusters():
    grid = GRIDS[1]
    query, key, value = random_qkv(grid, batch=2)
    plan = OPTIONS.plan(3 * query, 3 * key, value, AttentionCall(grid))
    assert plan.permutation.order.shape == (3, grid.num_tokens)
    assert not torch.equal(plan.mask.visible()[0], plan.mask.visible()[1])


def test_there_are_no_more_clusters_than_blocks():
    qkv = random_qkv(GRIDS[0])
    many, seven_and_fourteen = (
        SVG2(query_clusters=queries, key_clusters=keys, query_block_size=16, key_block_size=8).plan(
            *qkv, AttentionCall(GRIDS[0])
        )
        for queries, keys in ((99, 99), (7, 14))
    )
    assert torch.equal(many.permutation.order, seven_and_fourteen.permutation.order)
    assert torch.equal(many.key_permutation.order, seven_and_fourteen.key_permutation.order)


def test_options_are_checked():
    with pytest.raises(ValueError, match="`key_clusters` must be an integer of at least 1, got 0"):
        SVG2(key_clusters=0)
    with pytest.raises(ValueError, match="`least` must be a number from 0 to 1, got 2"):
        SVG2(least=2)

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffsparse import PAROAttention
from diffsparse.grid import TokenGrid
from diffsparse.strategies.paro_attention import AXES
from diffsparse.strategies.strategy import AttentionCall

GRID = TokenGrid(4, 5, 6, text_after=9)
SMALL = {"query_block_size": 8, "key_block_size": 8, "sampled_blocks": 99, "sampled_rows": 99}
DIMS = [(0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0), (2, 0, 1)]


def attention_maps(query, key, length=None) -> np.ndarray:
    """[B, H, S, S] float64."""
    scores = (query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5).numpy()
    if length is not None:
        scores = np.where(np.arange(scores.shape[-1]) < np.array(length)[:, None, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def order_of(dims, sizes=(4, 5, 6)) -> np.ndarray:
    return np.arange(np.prod(sizes)).reshape(sizes).transpose(dims).ravel()


def empty_and_incoherence(attention: np.ndarray, order: np.ndarray) -> tuple[float, float]:
    """Share of the 8 x 8 blocks of one map of the video that are empty, and their mean of max over mean."""
    ordered, empty, incoherence = attention[np.ix_(order, order)], [], []
    for q in range(0, len(order), 8):
        for k in range(0, len(order), 8):
            block = ordered[q : q + 8, k : k + 8]
            empty.append((block < 1e-3).mean() >= 0.9)
            incoherence.append(block.max() / block.mean())
    return float(np.mean(empty)), float(np.mean(incoherence))


CUBE = TokenGrid(8, 8, 8)


def heads_along_each_axis() -> list[torch.Tensor]:
    """q, k, v [1, 3, 512, 64]: the tokens of head a attend to those in one line with them along axis a."""
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(512).view(8, 8, 8)
    lines = [torch.arange(64).view(8, 8).unsqueeze(axis).expand_as(places).flatten() for axis in range(3)]
    directions = 7 * torch.eye(64)[torch.stack(lines)][None]
    noise = torch.randn(3, 1, 3, 512, 64, generator=generator)
    return [directions + 0.1 * noise[0], directions + 0.1 * noise[1], noise[2]]


def test_the_six_orders_are_those_of_the_dims():
    query, key, value = torch.randn(3, 1, 2, 129, 16).unbind()
    orders = PAROAttention(**SMALL).plan(query, key, value, AttentionCall(GRID)).permutation.orders
    assert orders[:, :120].tolist() == [order_of(dims).tolist() for dims in DIMS]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_order_is_the_best_by_all_blocks_of_the_map(alpha):
    torch.manual_seed(0)
    # Blocks near the share that makes them empty, more or less by the order.
    query, key, value = torch.randn(3, 2, 12, 129, 16).unbind()
    query, key = 2 * query, 2 * key
    options = PAROAttention(alpha=alpha, **SMALL)
    choice = options.plan(query, key, value, AttentionCall(GRID)).permutation.choice
    maps = attention_maps(query, key)
    for head in range(12):
        measured = np.array(
            [np.mean([empty_and_incoherence(maps[b, head], order_of(dims)) for b in range(2)], axis=0) for dims in DIMS]
        )
        full = 1 - measured[:, 0]
        score = alpha * full / full.sum() + (1 - alpha) * measured[:, 1] / measured[:, 1].sum()
        # Equal shares of empty blocks are common, and rounding decides between equals.
        assert score[choice[head]] <= score.min() + 1e-6


def test_the_order_with_most_empty_blocks_is_taken_not_that_with_fewest():
    query, key, value = heads_along_each_axis()
    choice = PAROAttention(alpha=1.0, **SMALL).plan(query, key, value, AttentionCall(CUBE)).permutation.choice
    for head, attention in enumerate(attention_maps(query, key)[0]):
        empty = [empty_and_incoherence(attention, order_of(dims, (8, 8, 8)))[0] for dims in DIMS]
        assert max(empty) > min(empty) + 0.1
        assert empty[choice[head]] == max(empty)
        # A line along an axis is one block where that axis is innermost.
        assert AXES[choice[head]][-1] == ("frame", "height", "width")[head]


def test_the_heaviest_blocks_are_seen_and_those_that_always_are():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 129, 16).unbind()
    length = torch.tensor([125, 129], dtype=torch.int32)
    plan = PAROAttention(density=0.4, **SMALL).plan(query, key, value, AttentionCall(GRID, key_length=length))
    maps = attention_maps(query, key, length.tolist()).sum(0)
    for head in range(3):
        order = plan.permutation.order[head].numpy()
        edges = np.arange(0, 129, 8)
        sums = np.add.reduceat(np.add.reduceat(maps[head][np.ix_(order, order)], edges, 0), edges, 1)
        always = np.eye(17, dtype=bool)
        always[15:], always[:, 15:] = True, True
        sums[always] = np.inf
        kept = round(0.4 * 17 * 17)
        expected = sums >= np.sort(sums.ravel())[-kept]
        assert np.array_equal(plan.mask.visible()[0, head].numpy(), expected)


@pytest.mark.parametrize("few", [{}, {"sampled_rows": 1, "sampled_blocks": 1}])
def test_attention_along_an_axis_needs_few_blocks_and_few_rows_to_find_them(few):
    query, key, value = heads_along_each_axis()
    plan = PAROAttention(density=1 / 64, **(SMALL | few)).plan(query, key, value, AttentionCall(CUBE))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert (plan.attend(query, key, value) - dense).norm() < 0.2 * dense.norm()


@pytest.mark.parametrize(("step", "num_steps", "lasts"), [(4, 10, False), (5, 10, True), (9, None, False)])
def test_the_second_half_of_the_steps_shares_a_plan(step, num_steps, lasts):
    query, key, value = torch.randn(3, 1, 1, 129, 16).unbind()
    plan = PAROAttention(**SMALL).plan(query, key, value, AttentionCall(GRID, step=step, num_steps=num_steps))
    assert plan.lasts == lasts


@pytest.mark.parametrize("wrong", [{"density": 0}, {"alpha": 1.5}, {"sampled_rows": 0}, {"shared_from": -1}])
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PAROAttention(**wrong)

from __future__ import annotations

import dataclasses
from statistics import fmean

import pytest
import torch

from diffsparse.block_mask import BlockMask
from diffsparse.eval import inspect_measures
from diffsparse.eval.inspect_measures import Attended, block_incoherence, measure
from diffsparse.grid import TokenGrid
from diffsparse.heads import HeadClass, sample_rows
from diffsparse.permutation import Permutation
from diffsparse.plan import AttentionPlan

# 109 tokens: neither block size divides them.
GRID = TokenGrid(3, 5, 7, text_before=1, text_after=3)
TOKENS, HEADS, BATCH = GRID.num_tokens, 3, 2
Q_BLOCK, K_BLOCK = 16, 8


def random_permutation(seed):
    generator = torch.Generator().manual_seed(seed)
    return Permutation(torch.stack([torch.randperm(TOKENS, generator=generator) for _ in range(HEADS)]))


def random_plan(**changes):
    generator = torch.Generator().manual_seed(5)
    visible = torch.rand(BATCH, HEADS, -(-TOKENS // Q_BLOCK), -(-TOKENS // K_BLOCK), generator=generator) < 0.4
    visible[..., 0] = True
    mask = BlockMask.from_visible(visible, TOKENS, Q_BLOCK, K_BLOCK)
    classes = torch.tensor([HeadClass.SPATIAL, HeadClass.TEXTURAL, HeadClass.TEMPORAL])
    return AttentionPlan(
        **({"permutation": random_permutation(1), "mask": mask, "classes": classes} | changes)
    ), visible


def attended(plan, seed=0, key_length=None, scale=None):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(BATCH, HEADS, TOKENS, 16, generator=generator) for _ in range(3))
    output = plan.attend(2 * query, key, value, key_length=key_length, scale=scale)
    return Attended(plan, 2 * query, key, value, output, GRID, key_length, scale)


def expected(call, visible, num_rows):
    """Recall and error of each head by the whole matrix of pairs, in float64, with the mask of blocks spread out."""
    rows = sample_rows(GRID, num_rows)
    query, key, value = (x.double() for x in (call.query, call.key, call.value))
    weights = query @ key.mT * (query.shape[-1] ** -0.5 if call.scale is None else call.scale)  # [B, H, S, S]
    if call.key_length is not None:
        for row, length in enumerate(call.key_length.tolist()):
            weights[row, :, :, length:] = -torch.inf
    weights = weights.softmax(-1)
    pairs = visible.repeat_interleave(Q_BLOCK, 2)[:, :, :TOKENS].repeat_interleave(K_BLOCK, 3)[..., :TOKENS]
    key_permutation = call.plan.key_permutation or call.plan.permutation
    in_place = torch.zeros_like(pairs)  # the same in the tokens' own order
    for head in range(HEADS):
        query_order, key_order = call.plan.permutation.order[head], key_permutation.order[head]
        in_place[:, head, query_order[:, None], key_order] = pairs[:, head]
    recall = (weights * in_place).sum(-1)[:, :, rows].mean((0, 2))
    difference = (call.output.double() - weights @ value)[:, :, rows]
    exact = (weights @ value)[:, :, rows]
    error = (difference.square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3))).sqrt()
    return recall.tolist(), error.tolist()


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, {}),
        ({"tail": torch.tensor([[True, False, True]])}, {"scale": 0.5}),
        ({"key_permutation": random_permutation(2)}, {}),
        ({"key_permutation": None}, {"key_length": torch.tensor([TOKENS, TOKENS - 20], dtype=torch.int32)}),
    ],
    ids=["plain", "tail", "keys in another order", "padded"],
)
def test_recall_and_error_are_those_of_the_whole_matrix(changes, more, monkeypatch):
    monkeypatch.setattr(inspect_measures, "SAMPLED_ROWS", 20)
    plan, visible = random_plan(**changes)
    call = attended(plan, **more)
    recall, error = expected(call, visible, 20)
    found = measure(call)
    # Sums of a hundred terms in float32.
    assert [head.recall for head in found] == pytest.approx(recall, abs=1e-5)
    assert [head.error for head in found] == pytest.approx(error, abs=1e-5)
    assert min(error) > 0.05
    assert max(recall) < 0.9
    assert [head.density for head in found] == pytest.approx(visible.float().mean((0, 2, 3)).tolist())
    assert [head.head_class for head in found] == ["spatial", "textural", "temporal"]
    assert [head.tail for head in found] == ([True, False, True] if "tail" in changes else [False] * HEADS)


@pytest.mark.parametrize("in_own_order", [False, True])
def test_queries_of_the_grid_alone_are_measured_as_they_are_among_the_text(in_own_order):
    grid = TokenGrid(3, 5, 7, text_after=4)
    num = grid.num_video_tokens
    order = torch.cat([torch.arange(num).flip(0), torch.arange(num, TOKENS)])
    plan, _ = random_plan(permutation=None if in_own_order else Permutation(order[None]))
    call = dataclasses.replace(attended(plan), grid=grid)
    first = {"query": call.query[:, :, :num], "output": call.output[:, :, :num]}
    alone = dataclasses.replace(call, plan=plan.of_first_queries(num), **first)
    for found, expected in zip(measure(alone), measure(call), strict=True):
        assert (found.recall, found.error) == pytest.approx((expected.recall, expected.error))


def test_a_plan_that_sees_everything_keeps_everything():
    everything = torch.ones(1, 1, -(-TOKENS // Q_BLOCK), -(-TOKENS // K_BLOCK), dtype=torch.bool)
    plan = AttentionPlan(random_permutation(3), BlockMask.from_visible(everything, TOKENS, Q_BLOCK, K_BLOCK))
    for head in measure(attended(plan)):
        assert head.recall == pytest.approx(1, abs=1e-5)
        assert head.error == pytest.approx(0, abs=1e-5)
        assert (head.density, head.head_class) == (1, "unclassed")


def test_a_head_that_keeps_the_orders_one_choice_is_measured_in_its_own():
    """Orders that heads choose from are the same as an order for each head."""
    plan, _ = random_plan()
    orders = plan.permutation.orders
    of_choice = Permutation(orders.flip(0), torch.tensor([2, 1, 0]))
    chosen = dataclasses.replace(plan, permutation=of_choice)
    assert measure(attended(chosen)) == measure(attended(plan))


def test_planted_attention_is_found_where_it_was_planted():
    """Each query attends to one key, 40 tokens on: a mask has it, or has not, or has that of half of the queries."""
    grid = TokenGrid(1, 8, 16)
    place = torch.arange(grid.num_tokens)
    target = (place + 40) % grid.num_tokens
    query = 50 * torch.eye(grid.num_tokens)[target][None, None]
    key = torch.eye(grid.num_tokens)[None, None]
    seen = torch.zeros(1, 3, 16, 16, dtype=torch.bool)
    seen[:, 0, place // 8, target // 8] = True
    seen[:, 1] = ~seen[:, 0]
    seen[:, 2] = seen[:, 1]
    seen[:, 2, :8] = True
    query, key = (x.expand(1, 3, -1, -1).contiguous() for x in (query, key))
    plan = AttentionPlan(None, BlockMask.from_visible(seen, grid.num_tokens, 8, 8))
    found = measure(Attended(plan, query, key, key, plan.attend(query, key, key, scale=1.0), grid, scale=1.0))
    assert [head.recall for head in found] == pytest.approx([1, 0, 0.5], abs=1e-3)
    assert found[0].error < 1e-3
    assert found[1].error > 0.9


def test_a_skipped_head_keeps_nothing():
    plan, _ = random_plan(skipped=torch.tensor([False, True, False]))
    found = measure(attended(plan))
    assert (found[1].recall, found[1].skipped) == (0, True)
    assert found[1].error == pytest.approx(1)
    assert found[0].recall > 0.1


@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({}, None),
        ({"key_permutation": random_permutation(2)}, None),
        ({"permutation": None}, None),
        ({"permutation": None, "key_permutation": random_permutation(2)}, None),
        ({}, [TOKENS, TOKENS - 20]),
    ],
    ids=["plain", "keys in another order", "own order", "only keys in an order", "padded"],
)
def test_incoherence_is_that_of_the_blocks_that_share_a_scale_in_both_orders(changes, lengths):
    plan, _ = random_plan(**changes)
    call = attended(plan)
    if lengths is not None:
        # What does not exist is last in the plan's order, too.
        order = torch.cat([torch.randperm(min(lengths)), torch.arange(min(lengths), TOKENS)])
        plan = dataclasses.replace(plan, permutation=Permutation(order[None]))
        call = dataclasses.replace(call, plan=plan, key_length=torch.tensor(lengths, dtype=torch.int32))
        call.query[1, :, lengths[1] :] = call.key[1, :, lengths[1] :] = torch.nan
    for head in range(HEADS):
        expected = [
            fmean(
                blocks_max_over_mean(call, row, head, orders, (lengths or [TOKENS] * BATCH)[row])
                for row in range(BATCH)
            )
            for orders in ((None, None), (plan.permutation, plan.key_permutation or plan.permutation))
        ]
        assert block_incoherence(call, head) == pytest.approx(expected, rel=1e-5)
        assert (expected[0] == expected[1]) == (plan.permutation is None and plan.key_permutation is None)


def blocks_max_over_mean(call, row, head, orders, length):
    """The mean over blocks, and over queries and smooth keys, of one head in one row of the batch, in float64."""
    key = call.key[row, head].double() - call.key[row, head, :length].double().mean(0)
    means = []
    for x, size, permutation in zip((call.query[row, head].double(), key), (Q_BLOCK, K_BLOCK), orders):
        order = torch.arange(TOKENS) if permutation is None else permutation.order[head % len(permutation.order)]
        means.append(fmean(float(b.abs().max() / b.abs().mean()) for b in x[order[:length]].split(size)))
    return fmean(means)


def test_an_order_that_gathers_tokens_of_the_same_size_takes_incoherence_to_its_least():
    """Planted: every second token is 9 times as large; the mean of all keys, which smoothing takes away, is larger."""
    size = torch.tensor([1.0, 9.0]).repeat(16)
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(8)
    x = (size * sign)[None, None, :, None].expand(1, 1, 32, 4)
    everything = torch.ones(1, 1, 4, 8, dtype=torch.bool)
    order = torch.cat([torch.arange(0, 32, 2), torch.arange(1, 32, 2)])
    plan = AttentionPlan(Permutation(order[None]), BlockMask.from_visible(everything, 32, 8, 4))
    call = Attended(plan, x, x + 100, x, x, TokenGrid(1, 4, 8))
    assert block_incoherence(call, 0) == pytest.approx((9 / 5, 1))


def test_an_order_that_is_the_tokens_own_is_not_measured_twice(monkeypatch):
    calls = []
    real = inspect_measures.incoherence
    monkeypatch.setattr(inspect_measures, "incoherence", lambda *args: calls.append(args) or real(*args))
    for changes, per_head in (({"permutation": None}, 2), ({}, 4)):
        calls.clear()
        measure(attended(random_plan(**changes)[0]))
        assert len(calls) == per_head * HEADS

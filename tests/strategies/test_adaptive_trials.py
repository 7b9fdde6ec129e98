from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from diffsparse.grid import TokenGrid
from diffsparse.heads import HeadClass
from diffsparse.strategies.adaptive import Adaptive, Candidate, _Sized
from diffsparse.strategies.adaptive_geometry import ORDERS, geometry_of
from diffsparse.strategies.adaptive_trials import RULES, Inputs, Means, Trial, scores_by
from diffsparse.strategies.block_impacts import block_impacts
from diffsparse.strategies.strategy import AttentionCall

GRID = TokenGrid(3, 7, 8, text_before=3, text_after=40)
LENGTH = torch.tensor([211, 180], dtype=torch.int32)
GEOMETRY = geometry_of(GRID, 16, 16, (2, 2, 4), 24, 0, torch.device("cpu"))


def inputs_of(rows, tail=True, key_length=LENGTH):
    query, key, value, noise = *(2 * torch.randn(2, 3, 211, 16) for _ in range(3)), torch.rand(2, 3, 14, 14)
    return Inputs(query, key, value, query[:, :, rows] * 0.3, 0.3, tail, key_length, noise)


@pytest.mark.parametrize(("order", "rule"), itertools.product(ORDERS, RULES))
@pytest.mark.parametrize("tail", [False, True])
def test_what_is_judged_is_what_the_plan_executes(order, rule, tail, monkeypatch):
    inputs = inputs_of(GEOMETRY.rows, tail)
    candidates = (Candidate(HeadClass.TEXTURAL, order, rule),)
    adaptive = Adaptive(0.5, 16, 16, (2, 2, 4), 24, tail=tail, equal_heads=True, candidates=candidates)
    monkeypatch.setattr(_Sized, "_noise", lambda *args: inputs.noise)
    call = AttentionCall(GRID, key_length=LENGTH, scale=0.3)
    plan = adaptive.plan(inputs.query, inputs.key, inputs.value, call)
    output = plan.attend(inputs.query, inputs.key, inputs.value, key_length=LENGTH, scale=0.3)
    exists = (torch.arange(211) < LENGTH[:, None])[:, None, None]
    exact = F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, exists, scale=0.3)
    output, exact = output[:, :, GEOMETRY.rows], exact[:, :, GEOMETRY.rows]
    expected = (output - exact).square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3))
    errors = Trial.of(ORDERS.index(order), [rule], [7], inputs, GEOMETRY).errors[:, :, 0, 0]  # [H, 2]
    judged = errors.amin(1) if tail else errors[:, 0]
    torch.testing.assert_close(judged, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("key_length", [None, LENGTH])
def test_for_the_output_goes_what_attention_gives_of_the_means_of_keys_that_exist(key_length):
    inputs = inputs_of(GEOMETRY.rows, key_length=key_length)
    means = Means(*(torch.randn(2, 3, blocks, 16) for blocks in (5, 14, 14)))
    sizes = torch.tensor([16.0] * 13 + [3.0])
    every_token = (x.repeat_interleave(sizes.long(), 2) for x in (means.key, means.value))
    exists = None if key_length is None else (torch.arange(211) < key_length[:, None])[:, None, None]
    output = F.scaled_dot_product_attention(means.query, *every_token, exists, scale=0.3)
    options = {"scale": 0.3, "tail": True, "order": GEOMETRY.orders[2:], "key_length": key_length}
    expected = block_impacts(means.query, output, inputs.key, inputs.value, 16, **options)
    actual = scores_by("impact", means, inputs, GEOMETRY, GEOMETRY.orders[2:])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

from __future__ import annotations

import itertools

import pytest
import torch

from diffsparse.strategies import planning_memory
from diffsparse.strategies.block_impacts import block_impacts

BLOCK = 8
LENGTHS = [27, 20]


def inputs(heads=3, tokens=30, rows=5):
    query = torch.randn(2, heads, rows, 16)
    return query, *(torch.randn(2, tokens, heads, 16).transpose(1, 2) for _ in range(2))


def attention(query, key, value, exists):
    """Output [D] and the sum of the weights, in float64."""
    weights = (key @ query * 0.5).exp() * exists
    return weights @ value / weights.sum(), weights.sum()


def outputs_of(query, key, value, lengths):
    """What attention gives each query, [B, H, R, D] float64."""
    output = torch.empty_like(query, dtype=torch.float64)
    for b, h, r in itertools.product(*map(range, query.shape[:3])):
        exists = torch.arange(key.shape[2]) < lengths[b]
        output[b, h, r], _ = attention(query[b, h, r].double(), key[b, h].double(), value[b, h].double(), exists)
    return output


def expected_impacts(query, key, value, lengths, tail):
    """By attention without the block, or with the mean of its keys in place of each: how far the output is off."""
    output = outputs_of(query, key, value, lengths)
    blocks = -(-key.shape[2] // BLOCK)
    impacts = torch.empty(*query.shape[:3], blocks, dtype=torch.float64)
    for b, h, r, k in itertools.product(*map(range, impacts.shape)):
        exists = torch.arange(key.shape[2]) < lengths[b]
        changed, block = key[b, h].double(), slice(k * BLOCK, min((k + 1) * BLOCK, lengths[b]))
        if block.start >= block.stop:
            impacts[b, h, r, k] = -torch.inf
            continue
        if tail:
            changed[block] = changed[block].mean(0)
        else:
            exists[block] = False
        moved, total = attention(query[b, h, r].double(), changed, value[b, h].double(), exists)
        impacts[b, h, r, k] = ((moved - output[b, h, r]).norm() * total).square().log()
    return output, impacts


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_it_is_how_far_the_output_moves(tail, lengths):
    query, key, value = inputs()
    output, expected = expected_impacts(query, key, value, lengths or [30, 30], tail)
    key_length = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    actual = block_impacts(query, output.float(), key, value, BLOCK, scale=0.5, tail=tail, key_length=key_length)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("heads_of_order", [1, 3])
def test_blocks_are_of_the_order(tail, heads_of_order):
    query, key, value = inputs()
    order = torch.stack([torch.randperm(30) for _ in range(heads_of_order)])
    index = order.expand(3, -1)[None, :, :, None].expand(2, -1, -1, 16)
    output = torch.randn_like(query)
    actual = block_impacts(query, output, key, value, BLOCK, scale=0.5, tail=tail, order=order)
    expected = block_impacts(query, output, key.gather(2, index), value.gather(2, index), BLOCK, scale=0.5, tail=tail)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("tail", [False, True])
def test_keys_that_do_not_exist_may_be_anything(tail):
    query, key, value = inputs()
    options = {"scale": 0.5, "tail": tail, "key_length": torch.tensor(LENGTHS)}
    expected = block_impacts(query, query, key, value, BLOCK, **options)
    for b, length in enumerate(LENGTHS):
        key[b, :, length:], value[b, :, length:] = torch.nan, torch.inf
    assert torch.equal(block_impacts(query, query, key, value, BLOCK, **options), expected)


def test_a_few_heads_and_queries_at_a_time_give_the_same(monkeypatch):
    query, key, value = inputs()
    order = torch.stack([torch.randperm(30) for _ in range(3)])
    options = {"scale": 0.5, "tail": True, "order": order, "key_length": torch.tensor(LENGTHS)}
    together = block_impacts(query, query, key, value, BLOCK, **options)
    monkeypatch.setattr(planning_memory, "PLANNING_BYTES", 1)
    torch.testing.assert_close(block_impacts(query, query, key, value, BLOCK, **options), together)


@pytest.mark.parametrize("height", [0.0, 1e3, -1e3])
def test_large_scores_do_not_overflow(height):
    query, key, value = inputs()
    query[..., 0], key[..., 0] = 2.0, height
    actual = block_impacts(query, query, key, value, BLOCK, scale=0.5, tail=True)
    expected = block_impacts(query[..., 1:], query, key[..., 1:], value, BLOCK, scale=0.5, tail=True)
    torch.testing.assert_close(actual, 2 * height + expected, rtol=1e-5, atol=5e-3)

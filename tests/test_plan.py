from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffsparse import plan
from diffsparse.block_mask import BlockMask
from diffsparse.permutation import Permutation
from diffsparse.plan import AttentionPlan


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return [torch.randn(2, 3, 65, 8) for _ in range(3)]


@pytest.fixture
def everything():
    """A mask that hides nothing."""
    return BlockMask.from_visible(torch.ones(1, 1, 5, 9, dtype=torch.bool), 65, 16, 8)


def test_a_plan_computes_attention_to_the_tokens_of_the_visible_blocks_of_its_order(qkv):
    order = torch.stack([torch.randperm(65) for _ in range(3)])
    visible = torch.rand(1, 3, 5, 9) < 0.5
    visible[..., 4] = True
    plan = AttentionPlan(Permutation(order), BlockMask.from_visible(visible, 65, 16, 8))
    for head in range(3):
        seen = torch.zeros(65, 65, dtype=torch.bool)
        for place_q, token_q in enumerate(order[head].tolist()):
            for place_k, token_k in enumerate(order[head].tolist()):
                seen[token_q, token_k] = visible[0, head, place_q // 16, place_k // 8]
        query, key, value = (x[:, head] for x in qkv)
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        assert torch.allclose(plan.attend(*qkv)[:, head], expected, atol=1e-5)


def test_keys_may_have_an_order_of_their_own(qkv):
    orders = [torch.stack([torch.randperm(65) for _ in range(3)]) for _ in range(2)]
    visible = torch.eye(5, dtype=torch.bool)[None, None]
    mask = BlockMask.from_visible(visible, 65, 16, 16)
    plan = AttentionPlan(Permutation(orders[0]), mask, key_permutation=Permutation(orders[1]))
    for head in range(3):
        block_of_query, block_of_key = (order[head].argsort() // 16 for order in orders)
        query, key, value = (x[:, head] for x in qkv)
        seen = block_of_query[:, None] == block_of_key
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        assert torch.allclose(plan.attend(*qkv)[:, head], expected, atol=1e-5)


def test_skipped_heads_give_zero_and_the_others_what_they_gave(qkv, everything):
    skipped = torch.tensor([False, True, False])
    output = AttentionPlan(None, everything, skipped=skipped).attend(*qkv)
    assert (output[:, 1] == 0).all()
    assert torch.equal(output[:, ~skipped], AttentionPlan(None, everything).attend(*qkv)[:, ~skipped])


def test_the_precision_reaches_the_kernel(qkv, everything):
    dense = F.scaled_dot_product_attention(*qkv)
    coarse, fine = (
        (AttentionPlan(None, everything, precision=name).attend(*qkv) - dense).norm() for name in ("int4", "int8")
    )
    # The steps are 127 / 7 times as large.
    assert 10 < coarse / fine < 30
    with pytest.raises(ValueError, match="`precision` must be one of native, int8"):
        AttentionPlan(None, everything, precision="fp4").attend(*qkv)


def test_the_mean_of_skipped_blocks_enters_in_the_heads_with_a_tail(qkv):
    order = torch.stack([torch.randperm(65) for _ in range(3)])
    # Each query block sees the first key block, and of the four others the means.
    visible = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    visible[..., 0] = True
    mask = BlockMask.from_visible(visible, 65, 16, 16)
    tail = torch.tensor([[True, False, True]])
    output = AttentionPlan(Permutation(order), mask, tail=tail).attend(*qkv)
    for head in range(3):
        query, key, value = (x[:, head] for x in qkv)
        blocks = order[head].split(16)
        keys, values = ([x[:, block] for block in blocks] for x in (key, value))
        sizes = torch.ones(16)
        if tail[0, head]:
            keys[1:], values[1:] = ([x.mean(1, keepdim=True) for x in parts[1:]] for parts in (keys, values))
            sizes = torch.cat([sizes, torch.tensor([16.0, 16.0, 16.0, 1.0])])
        keys, values = (torch.cat(parts, 1)[:, : len(sizes)] for parts in (keys, values))
        expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=sizes.log().expand(65, -1))
        assert torch.allclose(output[:, head], expected, atol=1e-5)


def test_scale_and_key_length_reach_the_kernel_and_the_order_is_kept_where_nothing_says_another(qkv, everything):
    plan = AttentionPlan(None, everything)
    length = torch.tensor([65, 40], dtype=torch.int32)
    exists = (torch.arange(65) < length[:, None])[:, None, None]
    expected = F.scaled_dot_product_attention(*qkv, attn_mask=exists, scale=0.7)
    assert torch.allclose(plan.attend(*qkv, key_length=length, scale=0.7), expected, atol=1e-5)


def test_the_schedule_of_its_mask_reaches_the_kernel(qkv, everything, monkeypatch):
    calls = []
    monkeypatch.setattr(
        plan, "block_sparse_attention", lambda query, *inputs, **options: calls.append(options) or query
    )
    AttentionPlan(None, everything).attend(*qkv)
    assert calls[0]["schedule"] is everything.schedule(2, 3)

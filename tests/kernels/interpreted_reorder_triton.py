"""The reordering kernels in Triton's interpreter; run by `test_reorder_triton.py` in a process of its own."""

from __future__ import annotations

import pytest
import torch
import triton

from diffsparse.kernels import reorder_triton

assert triton.knobs.runtime.interpret, "run this file with TRITON_INTERPRET=1"


@pytest.mark.parametrize("dim", [8, 20, 64])
@pytest.mark.parametrize("own_orders", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
def test_every_token_goes_to_its_place_and_back(dim, own_orders, contiguous):
    batch, heads, tokens = 2, 3, 70
    x = torch.randn(batch, tokens, heads, dim).transpose(1, 2)
    x = x.contiguous() if contiguous else x
    order = torch.stack([torch.randperm(tokens) for _ in range(heads if own_orders else 1)])
    there = reorder_triton.gather_tokens(x, order)
    assert there.is_contiguous()
    for b in range(batch):
        for h in range(heads):
            assert torch.equal(there[b, h], x[b, h, order[h if own_orders else 0]])
    back = reorder_triton.scatter_tokens(there, order)
    assert torch.equal(back, x)
    assert back.transpose(1, 2).is_contiguous()


def test_an_order_may_be_a_view():
    x = torch.randn(1, 3, 70, 8)
    order = torch.stack([torch.randperm(70) for _ in range(3)], dim=1).T
    there = reorder_triton.gather_tokens(x, order)
    assert torch.equal(there, x.gather(2, order[None, :, :, None].expand_as(x)))
    assert torch.equal(reorder_triton.scatter_tokens(there, order), x)

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch

from diffsparse.kernels import backends
from diffsparse.kernels.backends import attend_with, takes_orders


def call(attend, **options):
    """Of a backend with this `attend`, on 2 heads of 9 tokens that nothing else holds."""
    query, key, value = (torch.randn(1, 2, 9, 4) for _ in range(3))
    orders = {"query_order": None, "key_order": None, "schedule": None} | options
    lists = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1)
    return attend_with(
        SimpleNamespace(attend=attend), query, key, value, *lists, **orders, precision="native", return_lse=True
    )


@pytest.mark.parametrize(("name", "takes"), [("gluon", True), ("triton", True), ("eager", False), ("flex", False)])
def test_kernels_of_our_own_put_tokens_in_order(name, takes):
    if takes:
        pytest.importorskip("triton")
    assert takes_orders(name) is takes


def test_what_kernels_step_through_by_one_lies_side_by_side(monkeypatch):
    order = torch.randperm(9).repeat_interleave(2)[None, ::2]
    schedule = torch.tensor([1, 0]).int().repeat_interleave(2)[::2]
    given = []

    def takes_all(query, *inputs, query_order, key_order, schedule, return_lse):
        given.extend([query_order, key_order, schedule])
        return query, query[..., 0]

    call(takes_all, query_order=order, key_order=order, schedule=schedule)
    for x, expected in zip(given, (order, order, schedule), strict=True):
        assert x.is_contiguous()
        assert torch.equal(x, expected)

    # Where PyTorch's orders are kernels, these are no other.
    def takes_none(query, *inputs, return_lse):
        return query, query[..., 0]

    steps = []
    for name in ("in_order", "scatter_tokens"):
        original = getattr(backends, name)
        monkeypatch.setattr(
            backends, name, lambda x, order, then=original: steps.append(order.stride(1)) or then(x, order)
        )
    call(takes_none, query_order=order, key_order=order)
    assert steps == [1, 1, 1, 1]


def test_what_was_put_in_order_is_gone_before_the_output_comes_back(monkeypatch):
    ordered = []

    def takes_none(query, key, value, *lists, return_lse):
        ordered.extend(weakref.ref(x) for x in (query, key, value))
        return query + 0.0, query[..., 0] + 0.0

    def scatter_tokens(x, order):
        assert [ref() for ref in ordered] == [None] * 3
        return x

    monkeypatch.setattr(backends, "scatter_tokens", scatter_tokens)
    call(takes_none, query_order=torch.randperm(9)[None], key_order=torch.randperm(9)[None])
    assert len(ordered) == 3

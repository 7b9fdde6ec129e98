"""The kernel of what key blocks do in Triton's interpreter; run by `test_block_impacts_triton.py` in its own process.

The interpreter does not know bfloat16: float16 stands for it.
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import triton
from pretended_gpu import GPU, PretendedGPU

from diffsparse.kernels import block_impacts_triton
from diffsparse.strategies import block_impacts as judging

assert triton.knobs.runtime.interpret, "run this file with TRITON_INTERPRET=1"

SCALE = 0.3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(rows=5, dim=16, tokens=70, dtype=torch.float32):
    """Query, output, key and value of 2 x 3 heads, the last two as projections leave them."""
    query, output = torch.randn(2, 2, 3, rows, dim)
    return query, output, *(torch.randn(2, tokens, 3, dim).to(dtype).transpose(1, 2) for _ in range(2))


def orders(number, tokens=70):
    return torch.stack([torch.randperm(tokens) for _ in range(number)]) if number else None


def impacts_by_block(query, output, key, value, block_size, tail, order, lengths, *, computed=torch.float64):
    """A block at a time, computed in a precision, with what enters products rounded to another: that of the key."""
    batch, heads, tokens, _ = key.shape
    rounded = torch.float64 if computed == torch.float64 else key.dtype
    query, output, key, value = (x.to(computed) for x in (query, output, key, value))
    query = (query * (SCALE / block_impacts_triton.LN_2.value)).to(rounded).to(computed)
    impacts = query.new_full((*query.shape[:3], -(-tokens // block_size)), -torch.inf)
    for b, h, k in itertools.product(range(batch), range(heads), range(impacts.shape[3])):
        places = torch.arange(tokens if lengths is None else lengths[b])[k * block_size : (k + 1) * block_size]
        if len(places):
            those = places if order is None else order[h % len(order), places]
            logits = query[b, h] @ key[b, h, those].mT  # [R, size]
            peaks = logits.amax(1, keepdim=True)
            weights = (logits - peaks).exp2()
            if tail:
                weights -= (logits.mean(1, keepdim=True) - peaks).exp2()
            weights = weights.to(rounded).to(computed)
            moves = (weights[:, :, None] * (value[b, h, those] - output[b, h, :, None])).sum(1)
            impacts[b, h, :, k] = (2 * peaks[:, 0] + moves.square().sum(1).log2()) * block_impacts_triton.LN_2.value
    return impacts


def check(tensors, block_size, tail, order=None, lengths=None):
    """Held to float64, with a few times what the same computation in the same precisions is off at most.

    Of float32 that is ten times, since the sums are taken in another order; else what is rounded is nearly the same.
    """
    length = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    options = {"scale": SCALE, "tail": tail, "order": order, "key_length": length}
    actual = block_impacts_triton.block_impacts(*tensors, block_size, **options)
    exact = impacts_by_block(*tensors, block_size, tail, order, lengths)
    same = impacts_by_block(*tensors, block_size, tail, order, lengths, computed=torch.float32)
    assert (actual.shape, actual.dtype) == (exact.shape, torch.float32)
    assert actual.is_contiguous()
    some = exact.isfinite()
    assert torch.equal(actual[~some].double(), exact[~some])
    error, own_error = ((x[some] - exact[some]).abs().max().item() for x in (actual, same))
    assert error <= (10 if tensors[2].dtype == torch.float32 else 2) * own_error
    return actual


# Rows that fill tiles or don't; heads and blocks that fill theirs or don't; more blocks than a program takes.
SIZES = [(5, 20, 12, 230), (70, 64, 16, 70), (130, 80, 64, 150), (64, 64, 128, 300), (3, 256, 100, 130)]


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(("rows", "dim", "block_size", "tokens"), SIZES)
def test_impacts_are_those_of_each_block_by_itself(rows, dim, block_size, tokens, tail):
    check(inputs(rows, dim, tokens), block_size, tail)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(("rows", "dim", "block_size", "tokens"), SIZES)
def test_products_are_in_the_dtype_of_the_key(rows, dim, block_size, tokens, tail):
    check(inputs(rows, dim, tokens, torch.float16), block_size, tail, orders(3, tokens))


@pytest.mark.parametrize("rows", [64, 65, 130, 257])
def test_tiles_may_be_large(rows, monkeypatch):
    monkeypatch.setattr(block_impacts_triton, "_takes_large_tiles", lambda device: True)
    check(inputs(rows, 16, 70, torch.float16), 16, True, orders(3))


# The last block has no key, a few, or all that there are; the first of an element may have none.
@pytest.mark.parametrize("lengths", [None, [70, 20], [69, 16], [80, 0]])
@pytest.mark.parametrize("number_of_orders", [0, 1, 3])
@pytest.mark.parametrize("tail", [False, True])
def test_blocks_are_of_the_order_and_end_at_the_key_length(lengths, number_of_orders, tail):
    lengths_of_keys = None if lengths is None else [min(length, 70) for length in lengths]
    tensors, order = inputs(), orders(number_of_orders)
    actual = check(tensors, 16, tail, order, lengths_of_keys)
    if lengths is not None:
        length = torch.tensor(lengths)
        options = {"scale": SCALE, "tail": tail, "order": order, "key_length": length}
        assert torch.equal(block_impacts_triton.block_impacts(*tensors, 16, **options), actual)
        # What does not exist is not read.
        for b, last in enumerate(lengths_of_keys):
            for h in range(3):
                places = torch.arange(last, 70)
                those = places if order is None else order[h % len(order), places]
                tensors[2][b, h, those], tensors[3][b, h, those] = torch.nan, torch.nan
        assert torch.equal(block_impacts_triton.block_impacts(*tensors, 16, **options), actual)


@pytest.mark.parametrize("axes", [(3, 1, 2, 0), (0, 1, 3, 2), (2, 3, 0, 1)])
def test_tensors_may_lie_anywhere(axes):
    tensors, order, length = inputs(), orders(3), torch.tensor([70, 20], dtype=torch.int32)
    options = {"scale": SCALE, "tail": True}
    expected = block_impacts_triton.block_impacts(*tensors, 16, order=order, key_length=length, **options)
    back = [axes.index(axis) for axis in range(4)]
    tensors = [x.permute(axes).contiguous().permute(back) for x in tensors]
    order, length = order.T.contiguous().T, length.repeat_interleave(2)[::2]
    actual = block_impacts_triton.block_impacts(*tensors, 16, order=order, key_length=length, **options)
    assert torch.equal(actual, expected)


def test_an_order_may_be_shared_by_heads_without_a_copy():
    tensors, order = inputs(), orders(1)
    options = {"scale": SCALE, "tail": True}
    shared = block_impacts_triton.block_impacts(*tensors, 16, order=order, **options)
    expanded = block_impacts_triton.block_impacts(*tensors, 16, order=order.expand(3, -1), **options)
    assert torch.equal(shared, expanded)


@pytest.mark.parametrize("height", [1e3, -1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tail", [False, True])
def test_large_logits_do_not_overflow(height, dtype, tail):
    tensors = inputs(dtype=dtype)
    tensors[0][..., 0], tensors[2][..., 0] = 1 / SCALE, height
    assert check(tensors, 16, tail).isfinite().all()


@pytest.mark.parametrize("tail", [False, True])
def test_what_all_values_and_the_output_have_in_common_moves_nothing(tail):
    query, output, key, value = inputs(dtype=torch.float16)
    value = (value * 8).round() / 8  # so that the sums are exact
    impacts, same = (
        block_impacts_triton.block_impacts(query, output + x, key, value + x, 16, scale=SCALE, tail=tail)
        for x in (0, 64)
    )
    torch.testing.assert_close(same, impacts, rtol=0, atol=1e-3)


def test_a_key_that_is_its_own_mean_moves_nothing():
    tensors = inputs(tokens=65)
    assert check(tensors, 16, True)[..., -1].isneginf().all()


@pytest.mark.parametrize(("tail", "lengths"), [(False, None), (True, [70, 20])])
def test_it_is_what_torch_gives(tail, lengths):
    tensors, order = inputs(), orders(3)
    length = None if lengths is None else torch.tensor(lengths)
    actual = block_impacts_triton.block_impacts(*tensors, 16, scale=SCALE, tail=tail, order=order, key_length=length)
    expected = judging._block_impacts(*tensors, 16, SCALE, tail, order, length)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_a_kernel_that_is_right_is_used():
    with warnings.catch_warnings(), PretendedGPU():
        warnings.simplefilter("error", UserWarning)  # NumPy warns of the logarithm of zero
        assert judging._kernels.__wrapped__(GPU) is block_impacts_triton


def test_torch_takes_over_from_a_kernel_that_is_wrong(monkeypatch):
    right = block_impacts_triton.block_impacts

    def wrong(*tensors, **options):
        return right(*tensors, **(options | {"tail": False}))

    monkeypatch.setattr(block_impacts_triton, "block_impacts", wrong)
    with pytest.warns(UserWarning, match="is left out.*wrong on a small input"), PretendedGPU():
        assert judging._kernels.__wrapped__(GPU) is None

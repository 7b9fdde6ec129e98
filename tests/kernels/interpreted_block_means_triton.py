"""The kernel of the block means in Triton's interpreter; run by `test_block_means_triton.py`, in its own process."""

from __future__ import annotations

import warnings

import pytest
import torch
import triton
from pretended_gpu import GPU, PretendedGPU

from diffsparse.kernels import block_means_triton, operands_triton, pooling
from diffsparse.kernels.pooling import block_means

assert triton.knobs.runtime.interpret, "run this file with TRITON_INTERPRET=1"

LARGEST = torch.iinfo(torch.int32).max


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        # Sums of at most 64 numbers of size 1 in fp32, in another order.
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


# Within a pass of the kernel, one pass, more passes; one block; blocks that are whole.
@pytest.mark.parametrize(("tokens", "block_size"), [(70, 16), (70, 32), (70, 48), (70, 80), (64, 64), (5, 1)])
@pytest.mark.parametrize("dim", [20, 128])
@pytest.mark.parametrize("lengths", [None, [70, 33], [0, LARGEST]])
@pytest.mark.parametrize("orders", [0, 1, 2])
def test_it_gives_the_means_and_counts_that_torch_gives(tokens, block_size, dim, lengths, orders):
    x = torch.randn(2, tokens, 2, dim).transpose(1, 2)
    order = torch.stack([torch.randperm(tokens) for _ in range(orders)]) if orders else None
    length = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    actual = block_means_triton.block_means(x, block_size, length, order)
    assert_same(actual, block_means(x, block_size, length, order))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_summed_in_fp32(dtype):
    x = torch.randn(2, 1, 70, 16).to(dtype)
    assert_same(block_means_triton.block_means(x, 64, None, None), block_means(x, 64))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tensors_may_lie_anywhere_and_what_does_not_exist_may_be_nan(dtype):
    x, length = torch.randn(2, 3, 70, 32), torch.tensor([50, 20], dtype=dtype)
    order = torch.stack([torch.randperm(70) for _ in range(3)])
    expected = block_means(x, 16, length, order)
    for b in range(2):
        for h in range(3):
            x[b, h, order[h, length[b] :]] = torch.nan
    apart = torch.full((2, 3, 140, 40), torch.nan)
    apart[:, :, ::2, :32] = x
    anywhere = apart[:, :, ::2, :32], 16, length.repeat_interleave(2)[::2], torch.cat([order, order], 1)[:, :70]
    assert_same(block_means_triton.block_means(*anywhere), expected)


def test_the_tail_of_what_is_not_quantized_is_pooled_by_it(monkeypatch):
    query, key, value = (torch.randn(2, 2, 70, 16).bfloat16() for _ in range(3))
    length = torch.tensor([40, 70], dtype=torch.int32)
    key[0, :, 40:] = value[0, :, 40:] = torch.nan
    options = {"key_length": length, "query_order": None, "key_order": None, "pool": True}
    expected = operands_triton.prepared(query, key, value, "native", 16, 16, **options)
    monkeypatch.setattr(pooling, "_means_kernels", lambda device: block_means_triton)
    actual = operands_triton.prepared(query, key, value, "native", 16, 16, **options)
    for name in ("key_means", "value_means"):
        assert getattr(actual, name).dtype == torch.bfloat16
        # At most a rounding apart.
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=2**-7, atol=1e-6)


def pretend(monkeypatch):
    """The first use of the kernel on a GPU, whatever the device."""
    first_use = pooling._means_kernels.__wrapped__
    monkeypatch.setattr(pooling, "_means_kernels", lambda device: first_use(GPU))


def test_a_kernel_that_is_right_is_used(monkeypatch):
    inputs = torch.randn(2, 2, 70, 16), 16, torch.tensor([70, 30]), torch.randperm(70)[None]
    expected = block_means(*inputs)
    pretend(monkeypatch)
    with warnings.catch_warnings(), PretendedGPU():
        warnings.simplefilter("error")
        assert pooling._means_kernels(torch.device("cpu")) is block_means_triton
        actual = block_means(*inputs)
    assert_same(actual, expected)


@pytest.mark.parametrize(("output", "place"), [(0, 0), (0, -1), (1, 0), (1, -1)])
def test_torch_takes_over_from_a_kernel_that_is_wrong(output, place, monkeypatch):
    right = block_means_triton.block_means

    def wrong(*inputs):
        result = right(*inputs)
        result[output].view(-1)[place] += 1
        return result

    x = torch.randn(2, 2, 70, 16)
    expected = block_means(x, 16)
    monkeypatch.setattr(block_means_triton, "block_means", wrong)
    pretend(monkeypatch)
    with pytest.warns(UserWarning, match="means of blocks is left out.*wrong on a small input"), PretendedGPU():
        actual = block_means(x, 16)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_an_order_may_be_a_view():
    x = torch.randn(1, 3, 70, 8)
    order = torch.stack([torch.randperm(70) for _ in range(3)], dim=1).T
    assert_same(block_means_triton.block_means(x, 16, None, order), block_means(x, 16, order=order))

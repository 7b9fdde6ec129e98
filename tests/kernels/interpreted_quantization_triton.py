"""Quantized operands by Triton in Triton's interpreter, on the CPU.

Not collected with the rest, as `interpreted_block_sparse_triton.py`: `test_quantization_triton.py` runs this file.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton
from interpreted_fp8 import round_fp8_as_gpus_do

from diffsparse.kernels import quantization, quantization_triton
from diffsparse.kernels.pooling import block_means

assert triton.knobs.runtime.interpret, "run this file with TRITON_INTERPRET=1"

BITS = {"int8": 8, "int4": 4}


@pytest.fixture(autouse=True)
def _fp8(monkeypatch):
    round_fp8_as_gpus_do(monkeypatch)


def make_inputs(*, batch=2, heads=2, tokens=45, head_dim=24, lengths=None, ordered=None, dtype=torch.float32):
    """x as projections leave it, NaN where no token is; its order, and x and its mean in that order."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((batch, tokens, heads, head_dim), generator=generator)
    x[..., ::16] += 5.0
    x = x.to(dtype).transpose(1, 2)
    key_length, shortest = None, tokens
    if lengths is not None:
        key_length, shortest = torch.tensor(lengths, dtype=torch.int32), min(lengths)
        for b, length in enumerate(lengths):
            x[b, :, length:] = math.nan
    order, in_order = None, x
    if ordered is not None:
        # Padded text stays last, so what some batch entry lacks stays in its place.
        places = torch.rand((heads if ordered == "by head" else 1, shortest), generator=generator).argsort(-1)
        order = torch.cat([places, torch.arange(shortest, tokens).expand(len(places), -1)], dim=1)
        index = order.expand(heads, -1)[None, :, :, None].expand(batch, -1, -1, head_dim)
        in_order = x.gather(2, index)
    return x, order, in_order, key_length


def check_blocks(inputs, block_size, number, smooth=True):
    x, order, in_order, key_length = inputs
    mean = quantization.key_mean(x, key_length) if smooth else None
    actual = quantization_triton.quantize_blocks(
        x, block_size, number, order=order, mean=mean, key_length=key_length, pool=True
    )
    in_order = in_order.float() - mean if smooth else in_order
    if number == "fp8":
        values, scales = quantization.quantize_blocks_fp8(in_order, block_size, key_length)
    else:
        values, scales = quantization.quantize_blocks(in_order, block_size, BITS[number], key_length)
    if number == "int4":
        values = quantization.pack_int4(values)
    assert actual.values.dtype == values.dtype
    assert torch.equal(actual.values.float(), values.float())
    assert torch.equal(actual.scales, scales)
    check_means(actual.means, in_order, block_size, key_length, x)


def check_means(means, in_order, block_size, key_length, x):
    """The means of the blocks in x's dtype: off by a rounding, and by the order of the sum."""
    expected = block_means(in_order, block_size, key_length)[0]
    assert means.dtype == x.dtype
    largest = in_order.float().nan_to_num(0.0).abs().max()
    torch.testing.assert_close(
        means.float(), expected, rtol=torch.finfo(x.dtype).eps, atol=float(block_size * 2.0**-24 * largest)
    )


OPTIONS = [(None, None), ([16, 0], None), ([45, 20], "by head"), (None, "as one")]


@pytest.mark.parametrize("number", ["int8", "int4", "fp8"])
@pytest.mark.parametrize(("lengths", "ordered"), OPTIONS)
def test_blocks_keep_to_the_specification(number, lengths, ordered):
    check_blocks(make_inputs(lengths=lengths, ordered=ordered), 16, number)


@pytest.mark.parametrize("number", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("head_dim", [80, 256, 7])
def test_blocks_of_every_head_dim(number, head_dim):
    check_blocks(make_inputs(batch=1, heads=1, head_dim=head_dim), 64, number)


@pytest.mark.parametrize("number", ["int8", "int4", "fp8"])
def test_blocks_of_half_precision_and_without_a_mean(number):
    check_blocks(make_inputs(batch=1, dtype=torch.float16, ordered="by head"), 16, number, smooth=False)
    check_blocks(make_inputs(batch=1, dtype=torch.float16, ordered="by head"), 128, number)


def test_halves_are_rounded_to_even():
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.4999]).repeat(16, 1)[None, None]
    values = quantization_triton.quantize_blocks(x, 16, "int8").values
    assert values[0, 0, 0].tolist() == [127, 0, 2, 2, 0, -2, -2, 3]


def test_means_are_left_out_unless_asked_for():
    x = torch.ones(1, 1, 32, 16)
    assert quantization_triton.quantize_blocks(x, 16, "int8").means is None
    assert quantization_triton.quantize_values(x, 16, "fp8").means is None


@pytest.mark.parametrize("number", ["int8", "int4", "fp8"])
def test_blocks_of_nothing_become_zeros_with_a_scale_to_divide_by(number):
    values, scales, _ = quantization_triton.quantize_blocks(torch.full((1, 1, 16, 8), 1e-38), 16, number)
    assert (values.float() == 0).all()
    assert (scales > 0).all()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("number", ["int8", "int4", "fp8"])
def test_nan_is_in_the_scale_and_stays_in_its_block(number):
    x = torch.ones(1, 1, 64, 8)
    x[0, 0, 20, -1] = torch.nan
    scales = quantization_triton.quantize_blocks(x, 16, number).scales
    assert scales.isnan().tolist() == [[[False, True, False, False]]]
    channels = quantization_triton.quantize_values(x, 16, "int8" if number == "int8" else "fp8").scales
    assert channels.isnan().tolist() == [[[False] * 7 + [True]]]


def check_values(inputs, block_size, number="fp8", **interleave):
    x, order, in_order, key_length = inputs
    actual = quantization_triton.quantize_values(
        x, block_size, number, order=order, key_length=key_length, pool=True, **interleave
    )
    values, scales = quantization.quantize_values(in_order, number, key_length)
    values = quantization.interleaved(values) if interleave else values
    assert (actual.values.dtype, actual.values.is_contiguous()) == (values.dtype, True)
    assert torch.equal(actual.values.float(), values.float())
    assert torch.equal(actual.scales, scales)
    check_means(actual.means, in_order, block_size, key_length, x)


@pytest.mark.parametrize(("lengths", "ordered"), OPTIONS)
@pytest.mark.parametrize("interleave", [{}, {"interleave": True}])
def test_values_keep_to_the_specification(lengths, ordered, interleave):
    check_values(make_inputs(lengths=lengths, ordered=ordered), 16, **interleave)


@pytest.mark.parametrize("number", ["fp8", "int8"])
def test_values_of_half_precision(number):
    check_values(make_inputs(batch=1, dtype=torch.float16, ordered="by head"), 32, number)


@pytest.mark.parametrize(("head_dim", "block_size"), [(72, 64), (256, 128)])
def test_values_of_every_head_dim(head_dim, block_size):
    check_values(make_inputs(batch=1, heads=1, head_dim=head_dim), block_size)

from __future__ import annotations

import math

import pytest
import torch

from diffsparse.kernels import block_sparse_eager
from diffsparse.kernels.block_sparse import block_sparse_attention
from diffsparse.kernels.quantization import (
    PRECISIONS,
    QUANTIZED,
    incoherence,
    key_mean,
    pack_int4,
    quantize_blocks,
    quantize_blocks_fp8,
    quantize_values,
    quantized_operands,
    round_weights,
    round_weights_int8,
    unpack_int4,
)
from diffsparse.kernels.self_test import self_test


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(key):
    """The keys that diffusion transformers are known for: a few channels far from 0, for every token alike."""
    key[..., ::16] += 25.0
    return key


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("num_tokens", [64, 65, 105, 7])
def test_an_integer_is_the_nearest_and_the_largest_of_a_block_is_the_largest_there_is(bits, num_tokens):
    largest = {8: 127, 4: 7}[bits]
    x = normal(2, 3, num_tokens, 20)
    values, scales = quantize_blocks(x, 16, bits)
    assert (values.dtype, values.shape, scales.shape) == (torch.int8, x.shape, (2, 3, -(-num_tokens // 16)))
    for block in range(scales.shape[2]):
        tokens = slice(16 * block, 16 * block + 16)
        absmax = x[:, :, tokens].double().abs().amax(dim=(2, 3))
        torch.testing.assert_close(scales[:, :, block].double(), absmax / largest)
        assert (values[:, :, tokens].abs().amax(dim=(2, 3)) == largest).all()
        step = scales[:, :, block, None, None].double()
        error = (values[:, :, tokens] * step - x[:, :, tokens]).abs() / step
        assert error.max() <= 0.5 + 1e-5  # half a step, and fp32 on the way


def test_halves_are_rounded_to_even():
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.4999])
    values, _ = quantize_blocks(x[None, None, :, None], 8, bits=8)
    assert values.flatten().tolist() == [127, 0, 2, 2, 0, -2, -2, 3]


@pytest.mark.parametrize("quantize", [lambda *x: quantize_blocks(*x[:2], 8, *x[2:]), quantize_blocks_fp8])
def test_tokens_that_do_not_exist_neither_count_nor_matter(quantize):
    x = normal(2, 1, 40, 8)
    lengths = torch.tensor([40, 20], dtype=torch.int32)
    alone = quantize(x[1:, :, :20], 16)
    x[1, :, 20:] = torch.nan
    values, scales = (part[1:] for part in quantize(x, 16, lengths))
    assert torch.equal(values[:, :, :20].float(), alone[0].float())
    assert (values[:, :, 20:].float() == 0).all()
    assert torch.equal(scales[:, :, :2], alone[1])
    assert scales.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1e-38])
def test_blocks_of_nothing_become_zeros_with_a_scale_to_divide_by(value):
    x = torch.full((1, 1, 16, 8), value)
    of_values = (quantize_values(x, number) for number in ("int8", "fp8"))
    for values, scales in (quantize_blocks(x, 16, 8), quantize_blocks_fp8(x, 16), *of_values):
        assert (values.float() == 0).all()
        assert (scales > 0).all()


def test_nan_is_in_the_scale_and_stays_in_its_block():
    x = torch.ones(1, 1, 64, 8)
    x[0, 0, 20, -1] = torch.nan
    for _, scales in (quantize_blocks(x, 16, 8), quantize_blocks_fp8(x, 16)):
        assert scales.isnan().tolist() == [[[False, True, False, False]]]
    for number in ("int8", "fp8"):
        assert quantize_values(x, number)[1].isnan().tolist() == [[[False] * 7 + [True]]]


def test_fp8_blocks_are_off_by_half_a_step_of_e4m3():
    x = normal(2, 2, 65, 20)
    values, scales = quantize_blocks_fp8(x, 16)
    assert (values.dtype, values.float().abs().max()) == (torch.float8_e4m3fn, 448)
    back = values.double() * scales.double().repeat_interleave(16, dim=2)[:, :, :65, None]
    # Three bits of fraction down to 2 ** -6, below it a step of 2 ** -9; of what is scaled to 448.
    size = (x.abs() / scales.repeat_interleave(16, dim=2)[:, :, :65, None]).double()
    step = 2.0 ** (size.log2().floor().clamp(min=-6) - 3) * (x.abs() / size)
    assert ((back - x).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("num_tokens", [64, 65, 7])
@pytest.mark.parametrize("length", [None, 5])
# Relative to the largest of its channel, nothing is off by more than half a step at the top: 16 of 448, 0.5 of 127.
@pytest.mark.parametrize(
    ("number", "dtype", "half_a_step"), [("fp8", torch.float8_e4m3fn, 16 / 448), ("int8", torch.int8, 0.5 / 127)]
)
def test_values_are_transposed_with_a_scale_for_each_channel(num_tokens, length, number, dtype, half_a_step):
    value = normal(2, 3, num_tokens, 20) * torch.logspace(-3, 3, 20)
    end = length or num_tokens
    expected = value[:, :, :end].clone()
    value[:, :, end:] = torch.nan
    values, scales = quantize_values(value, number, None if length is None else torch.tensor([length, length]))
    assert values.dtype == dtype
    assert values.shape == (2, 3, 20, -(-num_tokens // 16) * 16)
    assert values.is_contiguous()
    assert (values[..., end:].float() == 0).all()
    back = (values.double() * scales[..., None]).mT[:, :, :end]
    largest = expected.abs().amax(dim=2, keepdim=True).double()
    assert ((back - expected).abs() <= 1.0001 * half_a_step * largest).all()
    # However different the channels are, so the relative error is that of each: 2.6 % rms for even fractions.
    assert ((back - expected).norm(dim=2) <= 0.05 * expected.norm(dim=2)).all()


def test_weights_are_rounded_relative_to_the_largest_of_their_row():
    weights = normal(5, 300).mul(3).softmax(-1)
    peak = weights.amax(-1, keepdim=True)
    rounded = round_weights(weights, peak)
    assert torch.equal(rounded.amax(-1, keepdim=True), peak)
    # Half a step of three bits, or of what 2 ** -9 / 256 of the peak is.
    assert ((rounded - weights).abs() <= (weights * 2.0**-4).maximum(peak * 2.0**-18) * 1.0001).all()
    assert torch.equal(round_weights(weights * 8, peak * 8), rounded * 8)


@pytest.mark.parametrize("num_keys", [64, 50])
def test_int8_weights_have_127_steps_to_the_largest_of_their_key_block(num_keys):
    weights = normal(5, num_keys).mul(3).softmax(-1)
    weights[0, :16] = 0
    rounded = round_weights_int8(weights, 16)
    for block, of_block in zip(weights.split(16, -1), rounded.split(16, -1)):
        largest = block.amax(-1, keepdim=True)
        torch.testing.assert_close(of_block.amax(-1, keepdim=True), largest)
        assert ((of_block - block).abs() <= 0.5001 / 127 * largest).all()
        steps = (of_block / largest * 127).nan_to_num(0)
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


def test_int8_weights_of_long_rows_are_closer_than_those_of_fp8_or_of_whole_rows():
    logits, value = 2 * normal(4, 64, 4096), normal(1, 4, 4096, 64)
    weights = logits.softmax(-1)
    expected = weights.double() @ value[0].double()

    def error_with(rounded, number):
        channels, scales = quantize_values(value, number)
        values = (channels[0].float() * scales[0, ..., None]).mT
        out = rounded @ values
        return relative(out / rounded.sum(-1, keepdim=True) if number == "int8" else out, expected)

    by_tile = error_with(round_weights_int8(weights, 64), "int8")
    by_row = error_with(round_weights_int8(weights, 4096), "int8")
    fp8 = error_with(round_weights(weights, weights.amax(-1, keepdim=True)), "fp8")
    # 1.8, 3.2 and 23 %.
    assert by_tile < 0.02 < 0.03 < fp8 < 0.035 < 0.2 < by_row


@pytest.mark.parametrize("head_dim", [8, 7, 1])
def test_unpack_reverses_pack(head_dim):
    values = torch.randint(-8, 8, (3, 5, head_dim), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = pack_int4(values)
    assert (packed.dtype, packed.shape) == (torch.uint8, (3, 5, -(-head_dim // 2)))
    assert torch.equal(unpack_int4(packed, head_dim), values)


def test_the_lower_halves_of_the_bytes_are_the_first_half_of_the_head_dim():
    assert pack_int4(torch.tensor([1, -1, 7], dtype=torch.int8)).tolist() == [0x71, 0x0F]


def test_the_mean_is_over_the_keys_that_exist():
    key = normal(2, 3, 40, 8).bfloat16()
    expected = torch.stack([key[0].double().mean(1), key[1, :, :20].double().mean(1)])[:, :, None]
    key[1, :, 20:] = torch.nan
    mean = key_mean(key, torch.tensor([40, 20], dtype=torch.int32))
    assert (mean.dtype, mean.shape) == (torch.float32, (2, 3, 1, 8))
    torch.testing.assert_close(mean.double(), expected)
    assert (key_mean(key, torch.tensor([0, 0], dtype=torch.int32)) == 0).all()


def test_incoherence_is_max_over_mean_of_a_block_and_smoothing_lowers_it():
    x = torch.zeros(1, 2, 24, 4)
    x[:, 0] = -3.0
    x[:, 1, 0, 0] = 8.0
    # Whole, then ragged; a block of zeros counts as even.
    assert incoherence(x, 16).tolist() == [[1.0, (64.0 + 1.0) / 2]]
    key = with_outliers(normal(1, 2, 100, 32))
    assert (incoherence(key, 32) > 2 * incoherence(key - key_mean(key), 32)).all()


def test_incoherence_is_of_the_tokens_that_exist():
    lengths = [37, 16, 20]  # ragged in its last block, whole blocks only, ragged with a block of none behind it
    x = normal(3, 2, 40, 8).bfloat16()
    expected = torch.empty(3, 2)
    for row, n in enumerate(lengths):
        for head in range(2):
            blocks = x[row, head, :n].double().abs().split(16)
            expected[row, head] = sum(block.max() / block.mean() for block in blocks) / len(blocks)
    for row, n in enumerate(lengths):
        x[row, :, n:] = torch.nan
    torch.testing.assert_close(incoherence(x, 16, torch.tensor(lengths, dtype=torch.int32)), expected)
    assert (incoherence(x, 16, torch.zeros(3, dtype=torch.int32)) == 1).all()


def attention_inputs(*, lengths=None, tail=None, outliers=True, dtype=torch.float32):
    """Two query heads of 105 tokens in query blocks of 32 and key blocks of 16; about half of the blocks are listed."""
    query, key, value = (normal(2, 2, 105, 64, seed=seed) for seed in range(3))
    if outliers:
        key = with_outliers(key)
    visible = torch.rand(2, 2, 4, 7, generator=torch.Generator().manual_seed(3)) < 0.5
    visible[..., 0] = True
    arguments = {
        "query": query.to(dtype),
        "key": key.to(dtype),
        "value": value.to(dtype),
        "key_blocks": visible.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32),
        "counts": visible.sum(-1, dtype=torch.int32),
        "query_block_size": 32,
        "key_block_size": 16,
        "key_length": None if lengths is None else torch.tensor(lengths, dtype=torch.int32),
        "tail": None if tail is None else torch.tensor(tail),
        "scale": 0.125,
        "return_lse": True,
    }
    return arguments, visible


def float64_attention(query, key, value, visible, lengths, tail, keys_of_means=None, values_of_means=None):
    """Output and logsumexp with every logit written out; the means are of other keys and values if given."""
    query, key, value = query.double(), key.double(), value.double()
    keys_of_means = key if keys_of_means is None else keys_of_means.double()
    values_of_means = value if values_of_means is None else values_of_means.double()
    out, lse = torch.zeros_like(query), torch.full(query.shape[:3], -math.inf).double()
    for b, h, row in torch.cartesian_prod(*map(torch.arange, visible.shape[:3])).tolist():
        end = 105 if lengths is None else lengths[b]
        logits, values = [], []
        rows = query[b, h, row * 32 : row * 32 + 32]
        for block, start in enumerate(range(0, end, 16)):
            tokens = slice(start, min(start + 16, end))
            if visible[b, h, row, block]:
                logits.append(rows @ key[b, h, tokens].T * 0.125)
                values.append(value[b, h, tokens])
            elif tail is not None and tail[b][h]:
                mean = keys_of_means[b, h, tokens].mean(0, keepdim=True)
                logits.append(rows @ mean.T * 0.125 + math.log(tokens.stop - start))
                values.append(values_of_means[b, h, tokens].mean(0, keepdim=True))
        if logits:
            scores = torch.cat(logits, dim=1)
            out[b, h, row * 32 : row * 32 + 32] = scores.softmax(-1) @ torch.cat(values)
            lse[b, h, row * 32 : row * 32 + 32] = scores.logsumexp(-1)
    return out, lse


def relative(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


OPTIONS = [(None, None), ([105, 40], None), (None, [[True, False], [True, True]]), ([105, 40], [[True, True]] * 2)]


# Relative L2 errors. Keys and queries of unit variance in blocks of 16 x 64 have an absmax of about 3.4, so a step is
# 0.027 with 8 bits and 0.49 with 4, an error of step / sqrt(12) each: sqrt(2) * 0.0077 = 0.011 of a logit's own size
# (0.2 with 4 bits) where the logits are of about unit variance, and as much of an output. Rounding in e4m3 is off by
# 2.6 % rms: of queries and of keys 3.6 %, of weights and of values 3.6 %, all four 5.1 %. INT8 values, whose largest of
# 105 is about 2.6, are off by 2.6 / 127 / sqrt(12) = 0.6 %, weights, of which the largest of 16 is three times their
# rms, by 0.7 %. Tests allow a quarter more, and a fifth less.
ERRORS = {"int8": 0.011, "int8_int8": 0.014, "int8_fp8": 0.038, "fp8": 0.051, "int4": 0.2}


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize(("lengths", "tail"), OPTIONS)
def test_it_is_attention_but_for_the_steps_of_the_precision(precision, lengths, tail):
    error = ERRORS[precision]
    arguments, visible = attention_inputs(lengths=lengths, tail=tail)
    expected = float64_attention(arguments["query"], arguments["key"], arguments["value"], visible, lengths, tail)
    if lengths is not None:
        for b, length in enumerate(lengths):
            arguments["key"][b, :, length:] = arguments["value"][b, :, length:] = torch.nan
    out, lse = block_sparse_eager.attend(**arguments, precision=precision)
    assert error / 1.25 < relative(out, expected[0]) < 1.25 * error
    # A logsumexp averages the errors of its logits: it is absolutely off by no more than one of them.
    assert (lse.double() - expected[1]).pow(2).mean().sqrt() < 1.25 * error


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize(("lengths", "tail"), OPTIONS)
def test_it_is_exactly_attention_of_what_quantization_leaves(precision, lengths, tail):
    arguments, visible = attention_inputs(lengths=lengths, tail=tail)
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    length = arguments["key_length"]
    operands = quantized_operands(query, key, value, precision, 32, 16, length)
    expected, expected_lse = float64_attention(
        operands.query, operands.key, operands.value, visible, lengths, tail, key - operands.key_mean, value
    )
    out, lse = block_sparse_eager.attend(**arguments, precision=precision)
    expected_lse += 0.125 * (query.double() @ operands.key_mean.double().mT)[..., 0]
    # What the mean adds is of a size of 10, in fp32.
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)
    # Weights in e4m3 are off by 2.6 % rms, in INT8 by 0.7 %.
    assert relative(out, expected) < {"native": 1e-5, "int8": 0.009, "fp8": 0.03}[PRECISIONS[precision].values]


def test_int8_needs_the_mean_of_the_keys_removed(monkeypatch):
    arguments, visible = attention_inputs()
    # Logits are of a variance of a quarter, so the error above is half as large.
    arguments["query"] /= 2
    expected, _ = float64_attention(*(arguments[name] for name in ("query", "key", "value")), visible, None, None)
    smoothed = relative(block_sparse_eager.attend(**arguments, precision="int8")[0], expected)
    monkeypatch.setattr("diffsparse.kernels.quantization.key_mean", lambda key, length: torch.zeros(1, 1, 1, 64))
    raw = relative(block_sparse_eager.attend(**arguments, precision="int8")[0], expected)
    assert smoothed < 0.01 < 0.03 < raw


@pytest.mark.parametrize("precision", QUANTIZED)
def test_query_blocks_that_see_everything_are_no_other_case(precision):
    arguments, _ = attention_inputs()
    everything = torch.arange(7, dtype=torch.int32).expand(2, 2, 4, 7)
    arguments |= {"key_blocks": everything, "counts": torch.full((2, 2, 4), 7, dtype=torch.int32)}
    out, lse = block_sparse_eager.attend(**arguments, precision=precision)
    expected = float64_attention(
        *(arguments[name] for name in ("query", "key", "value")), torch.ones(2, 2, 4, 7, dtype=torch.bool), None, None
    )
    error = ERRORS[precision]
    # Not much smaller either: PyTorch's own attention would not round the weights.
    assert error / 1.25 < relative(out, expected[0]) < 1.25 * error
    assert (lse.double() - expected[1]).pow(2).mean().sqrt() < 1.25 * error


@pytest.mark.parametrize("precision", QUANTIZED)
def test_queries_that_see_nothing_give_zeros(precision):
    arguments, _ = attention_inputs(lengths=[105, 0])
    out, lse = block_sparse_eager.attend(**arguments, precision=precision)
    assert (out[1] == 0).all()
    assert (lse[1] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_output_has_the_dtype_of_the_inputs(dtype):
    arguments, visible = attention_inputs(dtype=dtype, outliers=False)
    out, lse = block_sparse_eager.attend(**arguments, precision="int8")
    expected, _ = float64_attention(*(arguments[name] for name in ("query", "key", "value")), visible, None, None)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert relative(out, expected) < 1.25 * 0.011


def test_autocast_does_not_round_what_the_mean_key_adds_to_the_logsumexp():
    query, key, value = (normal(1, 2, 200, 64, seed=seed) for seed in range(3))
    lists = torch.arange(4, dtype=torch.int32).expand(1, 2, 2, 4), torch.full((1, 2, 2), 3, dtype=torch.int32)
    options = {"query_block_size": 128, "key_block_size": 64, "precision": "int8", "return_lse": True}
    out, lse = block_sparse_attention(query, key + 3.0, value, *lists, **options)
    with torch.autocast("cpu", torch.bfloat16):
        cast_out, cast_lse = block_sparse_attention(query, key + 3.0, value, *lists, **options)
    assert torch.equal(cast_out, out)
    assert torch.equal(cast_lse, lse)


@pytest.mark.parametrize("precision", QUANTIZED)
def test_self_test_holds_a_backend_to_the_eager_one_in_the_same_precision(precision):
    assert self_test("eager", precision=precision) == 0

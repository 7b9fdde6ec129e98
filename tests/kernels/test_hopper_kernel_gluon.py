"""The Hopper backend on the CPU, by the Gluon of `gluon_on_cpu.py`."""

from __future__ import annotations

import math
import random

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from gluon_on_cpu import block_sparse_gluon_on_cpu

from diffsparse.kernels import block_sparse_eager, quantization
from diffsparse.kernels.pooling import block_means
from diffsparse.kernels.reorder import in_order


@pytest.fixture(scope="module")
def gluon():
    return block_sparse_gluon_on_cpu()


@pytest.fixture(autouse=True)
def _chance(request):
    """What comes early and what late is by chance, the same for a test each time."""
    random.seed(request.node.name)


@pytest.fixture
def quantizes(monkeypatch):
    """The specification of what quantizes does so: the Triton kernels have tests of their own."""
    from diffsparse.kernels import operands_triton

    def quantize_blocks(x, block_size, number, *, order=None, mean=None, key_length=None, pool=False):
        smooth = in_order(x, order).float() - (0 if mean is None else mean)
        if number == "fp8":
            values, scales = quantization.quantize_blocks_fp8(smooth, block_size, key_length)
        else:
            values, scales = quantization.quantize_blocks(smooth, block_size, 8, key_length)
        return values, scales, block_means(smooth, block_size, key_length)[0].to(x.dtype) if pool else None

    def quantize_values(value, block_size, number, *, order=None, key_length=None, pool=False, interleave=False):
        value = in_order(value, order)
        values, scales = quantization.quantize_values(value, number, key_length)
        values = quantization.interleaved(values) if interleave else values
        return values, scales, block_means(value, block_size, key_length)[0].to(value.dtype) if pool else None

    monkeypatch.setattr(operands_triton, "quantize_blocks", quantize_blocks)
    monkeypatch.setattr(operands_triton, "quantize_values", quantize_values)


def make_inputs(
    *, dtype=torch.bfloat16, head_dim=64, key_block_size=128, lengths=None, tail=None, tokens=450, queries=None
):
    """Random, laid out as projections leave them, lists of random length with nonsense after their counts."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn((2, num, 2, head_dim), generator=generator).to(dtype).transpose(1, 2)
        for num in (queries or tokens, tokens, tokens)
    )
    if lengths is not None:
        for b, length in enumerate(lengths):
            key[b, :, length:] = value[b, :, length:] = math.nan
    rows, columns = -(-(queries or tokens) // 128), -(-tokens // key_block_size)
    counts = torch.randint(1, columns + 1, (2, 2, rows), generator=generator, dtype=torch.int32)
    key_blocks = torch.rand((2, 2, rows, columns), generator=generator).argsort(-1).to(torch.int32)
    key_blocks[torch.arange(columns) >= counts[..., None]] = -(2**30)
    return {
        "query": query,
        "key": key,
        "value": value,
        "key_blocks": key_blocks,
        "counts": counts,
        "query_block_size": 128,
        "key_block_size": key_block_size,
        "key_length": None if lengths is None else torch.tensor(lengths, dtype=torch.int32),
        "tail": None if tail is None else torch.tensor(tail),
        "scale": head_dim**-0.5,
        "return_lse": True,
    }


def check(gluon, inputs, precision="native", **options):
    out, lse = gluon.attend(**inputs, precision=precision, **options)
    assert out.transpose(1, 2).is_contiguous()
    if "query_order" in options:  # rows go back to where their queries came from
        out, lse = in_order(out, options["query_order"]), in_order(lse[..., None], options["query_order"])[..., 0]
    for name, order in (("query", "query_order"), ("key", "key_order"), ("value", "key_order")):
        inputs[name] = in_order(inputs[name], options.get(order))
    expected, expected_lse = block_sparse_eager.attend(**inputs, precision=precision)
    assert (out.dtype, out.shape) == (expected.dtype, expected.shape)
    assert out.isfinite().all()
    # Roundings of weights, of means and of the output. FP8 weights are rounded relative to the largest so far, not to
    # the largest of all.
    allowed = 4e-2 if "fp8" in precision else 3 * torch.finfo(out.dtype).eps / 2
    assert (out.float() - expected.float()).norm() <= allowed * expected.float().norm()
    seen = expected_lse > -math.inf
    assert torch.equal(lse > -math.inf, seen)
    assert (lse - expected_lse)[seen].norm() <= 2e-4 * expected_lse[seen].norm()


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 128), (torch.float16, 64)], ids=str)
@pytest.mark.parametrize("key_block_size", [64, 128])
@pytest.mark.parametrize("tail", [None, [[True, False], [False, True]]])
@pytest.mark.parametrize("lengths", [None, [450, 300], [128, 0]])
def test_it_keeps_to_the_specification(gluon, dtype, head_dim, key_block_size, tail, lengths):
    sizes = {"dtype": dtype, "head_dim": head_dim, "key_block_size": key_block_size}
    check(gluon, make_inputs(tail=tail, lengths=lengths, **sizes))


@pytest.mark.usefixtures("quantizes")
@pytest.mark.parametrize("precision", ["int8", "int8_fp8", "fp8"])
@pytest.mark.parametrize(("head_dim", "key_block_size"), [(64, 128), (128, 64), (128, 128)])
@pytest.mark.parametrize(("lengths", "tail"), [(None, None), ([450, 300], [[True, True]]), (None, [[True, False]])])
def test_precisions(gluon, precision, head_dim, key_block_size, lengths, tail):
    sizes = {"dtype": torch.float16, "head_dim": head_dim, "key_block_size": key_block_size}
    check(gluon, make_inputs(lengths=lengths, tail=tail, **sizes), precision)


def sees_all_of(inputs):
    """Every query sees every key block, in an order in which neither the first nor the last comes first."""
    _, _, num_rows, num_blocks = inputs["key_blocks"].shape
    key_blocks = torch.arange(num_blocks).int().roll(-1)
    counts = torch.full((2, 2, num_rows), num_blocks).int()
    return inputs | {"key_blocks": key_blocks.expand(2, 2, num_rows, -1), "counts": counts}


@pytest.mark.usefixtures("quantizes")
@pytest.mark.parametrize("precision", ["int8", "int8_fp8", "fp8"])
@pytest.mark.parametrize("key_block_size", [64, 128])
def test_queries_of_nothing_see_as_much_of_each_key_that_exists(gluon, precision, key_block_size):
    # Of nothing and of a block without a key the scales are so small that their product would be nothing too.
    inputs = sees_all_of(make_inputs(lengths=[200, 100], key_block_size=key_block_size))
    inputs["query"][:] = 0.0
    check(gluon, inputs, precision)


@pytest.mark.usefixtures("quantizes")
@pytest.mark.parametrize("precision", ["native", "int8", "int8_fp8", "fp8"])
@pytest.mark.parametrize("key_block_size", [64, 128])
@pytest.mark.parametrize("name", ["query", "key"])
def test_what_is_not_a_number_stays_so(gluon, precision, key_block_size, name):
    inputs = sees_all_of(make_inputs(key_block_size=key_block_size))
    inputs[name][0, 0, 200, 3] = math.nan
    actual = gluon.attend(**inputs, precision=precision)
    expected = block_sparse_eager.attend(**inputs, precision=precision)
    assert all(torch.equal(x.isnan(), y.isnan()) for x, y in zip(actual, expected))


@pytest.mark.usefixtures("quantizes")
@pytest.mark.parametrize("precision", ["native", "int8", "int8_fp8"])
@pytest.mark.parametrize("queries", [450, 333])
def test_tokens_are_taken_in_their_orders(gluon, precision, queries):
    # What the second batch entry lacks stays last.
    places = torch.rand((2, 300), generator=torch.Generator().manual_seed(1)).argsort(-1)
    key_order = torch.cat([places, torch.arange(300, 450).expand(2, -1)], 1)
    inputs = make_inputs(lengths=[450, 300], tail=[[True, False]], queries=queries)
    query_order = torch.stack([torch.arange(queries).flip(0), torch.arange(queries).roll(7)])
    check(gluon, inputs, precision, query_order=query_order, key_order=key_order)


def few_rows(*, num_key_blocks, most, tail, key_block_size=128):
    """One head of 256 queries, which see up to `most` of many key blocks."""
    tokens = key_block_size * num_key_blocks
    inputs = make_inputs(head_dim=128, tokens=tokens, tail=tail, key_block_size=key_block_size)
    inputs["query"] = inputs["query"][:1, :1, :256]
    inputs |= {name: inputs[name][:1, :1] for name in ("key", "value")}
    generator = torch.Generator().manual_seed(0)
    lists = torch.rand((1, 1, 2, num_key_blocks), generator=generator).argsort(-1)[..., :most]
    return inputs | {"key_blocks": lists.int(), "counts": torch.tensor([[[most, most - 1]]], dtype=torch.int32)}


@pytest.mark.usefixtures("quantizes")
@pytest.mark.parametrize("precision", ["native", "int8", "int8_fp8"])
@pytest.mark.parametrize(("key_block_size", "num_key_blocks"), [(64, 119), (128, 60)])
def test_tiles_are_neither_taken_nor_freed_too_early(gluon, precision, key_block_size, num_key_blocks):
    # What a tile holds after it is freed is nonsense: often enough both warpgroups are slow.
    sizes = {"key_block_size": key_block_size, "num_key_blocks": num_key_blocks, "most": num_key_blocks}
    for _ in range(3):
        check(gluon, few_rows(tail=None, **sizes), precision)


@pytest.mark.usefixtures("quantizes")
@pytest.mark.parametrize("precision", ["native", "int8"])
def test_more_means_than_a_tile(gluon, precision):
    check(gluon, few_rows(num_key_blocks=140, most=5, tail=[[True]]), precision)


def test_the_schedule_changes_nothing_but_the_order(gluon, monkeypatch):
    monkeypatch.setattr(gluon, "heavy_first", None)  # not asked for
    inputs = make_inputs()
    check(gluon, inputs, schedule=torch.randperm(inputs["counts"].numel()).int())

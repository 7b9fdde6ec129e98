"""The Triton backend in Triton's interpreter, on the CPU.

Not collected with the rest: the interpreter has to be asked for before Triton is first imported, so
`test_block_sparse_triton.py` runs this file in a process of its own. The interpreter does not know bfloat16.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton
from interpreted_fp8 import round_fp8_as_gpus_do

from diffsparse.kernels import block_sparse_eager, block_sparse_triton
from diffsparse.kernels.reorder import in_order
from diffsparse.kernels.tuning import Tuning

assert triton.knobs.runtime.interpret, "run this file with TRITON_INTERPRET=1"


def make_inputs(
    *,
    batch=1,
    heads=2,
    tokens=105,
    head_dim=64,
    query_block_size=32,
    key_block_size=16,
    lengths=None,
    tail=None,
    dtype=torch.float32,
    shared_lists=False,
    queries=None,
):
    """Random, laid out as projections leave them, lists of random length with nonsense after their counts."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn((batch, num, heads, head_dim), generator=generator).to(dtype).transpose(1, 2)
        for num in (queries or tokens, tokens, tokens)
    )
    if lengths is not None:
        for b, length in enumerate(lengths):
            key[b, :, length:] = value[b, :, length:] = math.nan
    rows, columns = -(-(queries or tokens) // query_block_size), -(-tokens // key_block_size)
    leading = (1, 1) if shared_lists else (batch, heads)
    counts = torch.randint(1, columns + 1, (*leading, rows), generator=generator, dtype=torch.int32)
    key_blocks = torch.rand((*leading, rows, columns), generator=generator).argsort(-1).to(torch.int32)
    key_blocks[torch.arange(columns) >= counts[..., None]] = -7
    return {
        "query": query,
        "key": key,
        "value": value,
        "key_blocks": key_blocks,
        "counts": counts,
        "query_block_size": query_block_size,
        "key_block_size": key_block_size,
        "key_length": None if lengths is None else torch.tensor(lengths, dtype=torch.int32),
        "tail": None if tail is None else torch.tensor(tail),
        "scale": head_dim**-0.5,
        "return_lse": True,
    }


def check(inputs):
    """As close to the specification as the roundings allow: of weights, of means, of the output."""
    out, lse = block_sparse_triton.attend(**inputs)
    expected, expected_lse = block_sparse_eager.attend(**inputs)
    assert (out.dtype, out.shape, lse.dtype) == (expected.dtype, expected.shape, torch.float32)
    assert out.isfinite().all()
    roundoff = max(torch.finfo(out.dtype).eps / 2, 2.0**-19)
    assert (out.float() - expected.float()).norm() <= 3 * roundoff * expected.float().norm()
    seen = expected_lse > -math.inf
    assert torch.equal(lse > -math.inf, seen)
    assert (lse - expected_lse)[seen].norm() <= 3 * roundoff * expected_lse[seen].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tail", [None, [[True, True]], [[True, False], [False, True]]])
@pytest.mark.parametrize("lengths", [None, [105, 50], [16, 0]])
def test_it_keeps_to_the_specification(dtype, tail, lengths):
    check(make_inputs(batch=2, tail=tail, lengths=lengths, dtype=dtype))


@pytest.mark.parametrize("queries", [41, 300])
def test_fewer_or_more_queries_than_keys(queries):
    check(make_inputs(batch=2, queries=queries, tail=[[True, False]], lengths=[105, 50]))


@pytest.mark.parametrize("head_dim", [32, 40, 80, 96, 112, 128, 256])
def test_every_head_dim(head_dim):
    check(make_inputs(heads=1, head_dim=head_dim, tail=[[True]]))


@pytest.mark.parametrize(("query_block_size", "key_block_size"), [(64, 64), (128, 64), (64, 128), (128, 128)])
def test_block_sizes(query_block_size, key_block_size):
    blocks = {"query_block_size": query_block_size, "key_block_size": key_block_size}
    check(make_inputs(tokens=300, tail=[[True, False]], shared_lists=True, **blocks))


def test_more_means_than_a_tile():
    check(make_inputs(heads=1, tokens=1100, head_dim=16, query_block_size=256, tail=[[True]]))


def test_a_mean_of_one_token_counts():
    check(make_inputs(tokens=97, tail=[[True, True]]))


def test_the_logsumexp_is_left_out_unless_asked_for():
    inputs = make_inputs()
    out, lse = block_sparse_triton.attend(**inputs | {"return_lse": False})
    assert lse.shape == (0,)
    assert torch.equal(out, block_sparse_triton.attend(**inputs)[0])


def test_large_logits_do_not_overflow():
    inputs = make_inputs(tail=[[True, True]])
    inputs["query"] *= 1000
    assert all(x.isfinite().all() for x in block_sparse_triton.attend(**inputs))


@pytest.fixture(autouse=True)
def right_fp8(monkeypatch):
    round_fp8_as_gpus_do(monkeypatch)


@pytest.fixture
def by_descriptor(monkeypatch):
    """Keys and values come by descriptors, as on Hopper."""
    monkeypatch.setattr(block_sparse_triton, "_tuning", lambda *arguments: Tuning(16, 4, 2, descriptors=True))


@pytest.mark.parametrize("head_dim", [64, 40])
@pytest.mark.parametrize("lengths", [None, [50]])
@pytest.mark.parametrize("tail", [None, [[True, False]]])
def test_descriptors(by_descriptor, head_dim, lengths, tail):
    check(make_inputs(head_dim=head_dim, lengths=lengths, tail=tail, key_block_size=32))


@pytest.mark.parametrize("precision", ["int8", "int8_int8", "int4", "int8_fp8", "fp8"])
@pytest.mark.parametrize(("lengths", "tail"), [(None, None), ([50], None), (None, [[True, False]])])
def test_precisions(precision, lengths, tail):
    inputs = make_inputs(tokens=70, lengths=lengths, tail=tail, key_block_size=32, dtype=torch.float16)
    check_precision(inputs, precision)


@pytest.mark.parametrize(("precision", "head_dim"), [("int8", 48), ("int8_int8", 48), ("int8_fp8", 48), ("int4", 96)])
def test_precisions_by_descriptor(by_descriptor, precision, head_dim):
    # A key block is two tiles here, and INT8 weights are rounded relative to the largest of each.
    allowed = 1e-2 if precision == "int8_int8" else None
    check_precision(make_inputs(heads=1, head_dim=head_dim, key_block_size=32, dtype=torch.float16), precision, allowed)


@pytest.mark.parametrize(("head_dim", "lengths"), [(33, None), (80, [50]), (128, None)])
def test_packed_halves_of_every_head_dim(head_dim, lengths):
    check_precision(make_inputs(heads=1, head_dim=head_dim, lengths=lengths, tail=[[True]], key_block_size=32), "int4")


def check_precision(inputs, precision, allowed=None):
    """FP8 weights are rounded relative to the largest so far, not to the largest of all; else as close as ever."""
    out, lse = block_sparse_triton.attend(**inputs, precision=precision)
    expected, expected_lse = block_sparse_eager.attend(**inputs, precision=precision)
    error = (out.float() - expected.float()).norm() / expected.float().norm()
    assert error <= (allowed or (4e-2 if "fp8" in precision else 2e-3))
    seen = expected_lse > -math.inf
    assert torch.equal(lse > -math.inf, seen)
    assert (lse - expected_lse)[seen].norm() <= 1e-4 * expected_lse[seen].norm()


@pytest.mark.parametrize(
    ("precision", "queries"),
    [("native", 70), *((precision, 41) for precision in ("native", "int8", "int8_int8", "int4", "int8_fp8", "fp8"))],
)
def test_it_takes_tokens_in_their_orders(precision, queries):
    sizes = {"tokens": 70, "queries": queries, "key_block_size": 32, "dtype": torch.float16}
    inputs = make_inputs(lengths=[50], tail=[[True, False]], **sizes)
    # What the batch entry lacks stays last.
    places = torch.rand((2, 50), generator=torch.Generator().manual_seed(1)).argsort(-1)
    key_order = torch.cat([places, torch.arange(50, 70).expand(2, -1)], 1)
    query_order = torch.stack([torch.arange(queries).flip(0), torch.arange(queries).roll(7)])
    orders = {"query_order": query_order, "key_order": key_order}
    out, lse = block_sparse_triton.attend(**inputs, precision=precision, **orders)
    for name, order in (("query", query_order), ("key", key_order), ("value", key_order)):
        inputs[name] = in_order(inputs[name], order)
    expected, expected_lse = block_sparse_triton.attend(**inputs, precision=precision)
    # Rows go back to where their queries came from.
    out, lse = in_order(out, query_order), in_order(lse[..., None], query_order)[..., 0]
    # The mean of all keys is summed in another order, which may put a key on the other side of a half.
    assert (out.float() - expected.float()).norm() <= 2e-3 * expected.float().norm()
    assert (lse - expected_lse).norm() <= 1e-4 * expected_lse.norm()


def test_a_negative_scale():
    check(make_inputs() | {"scale": -0.1})


def test_a_scale_of_nothing_is_the_mean():
    check(make_inputs(tail=[[True, False]]) | {"scale": 0.0})


def test_the_schedule_changes_nothing_but_the_order(monkeypatch):
    inputs = make_inputs(batch=2)
    expected = block_sparse_triton.attend(**inputs)
    monkeypatch.setattr(block_sparse_triton, "heavy_first", None)  # not asked for
    schedule = torch.randperm(2 * 2 * 4, generator=torch.Generator().manual_seed(0)).int()
    actual = block_sparse_triton.attend(**inputs, schedule=schedule)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected))


def test_int8_weights_of_a_distant_tile_keep_their_steps():
    # The second half of the keys weighs 2 ** -10 of the first: relative to the row, all would be zeros.
    inputs = make_inputs(heads=1, tokens=64, key_block_size=32, dtype=torch.float16)
    inputs["query"][:], inputs["key"][:] = 0.0, 0.0
    inputs["query"][..., 0], inputs["key"][:, :, :32, 0] = 1.0, 10 * 64**0.5 * math.log(2)
    inputs["value"][:, :, :32] = 0.0
    inputs |= {"key_blocks": torch.tensor([0, 1]).int().expand(1, 1, 2, 2), "counts": torch.full((1, 1, 2), 2).int()}
    out, _ = block_sparse_triton.attend(**inputs, precision="int8_int8")
    expected = inputs["value"][:, :, 32:].float().mean(2, keepdim=True).expand_as(out) * 2.0**-10
    assert (out - expected).norm() <= 0.02 * expected.norm()


def test_int8_weights_of_huge_logits_do_not_overflow():
    inputs = make_inputs(key_block_size=32, tail=[[True, False]])
    inputs["query"] *= 1e5
    inputs["value"].abs_().add_(1)
    out, _ = block_sparse_triton.attend(**inputs, precision="int8_int8")
    # An average of positive numbers: a weight of 128 would be one of -128.
    assert (out > 0.9).all()


@pytest.mark.parametrize("precision", ["int8", "int8_int8", "int4", "int8_fp8", "fp8"])
@pytest.mark.parametrize("scale", [0.125, 0.0])
def test_queries_of_nothing_see_as_much_of_each_key_that_exists(precision, scale):
    # Of nothing and of a block without a key the scales are so small that their product would be nothing too.
    inputs = make_inputs(tokens=70, lengths=[50], key_block_size=32, dtype=torch.float16) | {"scale": scale}
    inputs["query"][:] = 0.0
    inputs |= {"key_blocks": torch.tensor([2, 0, 1]).int().expand(1, 2, 3, 3), "counts": torch.full((1, 2, 3), 3).int()}
    check_precision(inputs, precision)


@pytest.mark.parametrize("precision", ["native", "int8", "int8_int8", "int4", "int8_fp8", "fp8"])
@pytest.mark.parametrize("name", ["query", "key"])
def test_what_is_not_a_number_stays_so(precision, name):
    inputs = make_inputs(heads=1, tokens=96, key_block_size=32, dtype=torch.float16)
    inputs |= {"key_blocks": torch.tensor([[[[0, 1], [0, 2], [2, 0]]]]).int(), "counts": torch.full((1, 1, 3), 2).int()}
    inputs[name][0, 0, 40, 3] = math.nan
    actual = block_sparse_triton.attend(**inputs, precision=precision)
    expected = block_sparse_eager.attend(**inputs, precision=precision)
    assert all(torch.equal(x.isnan(), y.isnan()) for x, y in zip(actual, expected))

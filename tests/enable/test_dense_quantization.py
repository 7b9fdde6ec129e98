"""Dense calls in 8 bits: early steps and dense layers by the kernel with all blocks listed."""

from __future__ import annotations

import logging

import pytest
import torch
from enabled import DENSE, SPARSE, config, report_of, run, run_steps
from tiny_models import TINY

import diffsparse.config
from diffsparse import speed_check
from diffsparse.kernels import block_sparse, block_sparse_eager
from diffsparse.kernels.block_sparse import block_sparse_attention
from diffsparse.session import Session
from diffsparse.steps import Step
from diffsparse.strategies import all_blocks
from diffsparse.strategies.all_blocks import AllBlocks


@pytest.fixture
def tiny():
    return TINY["wan"]


def test_early_steps_are_as_exact_as_the_precision_and_reported_as_dense(model, call):
    stock = run(model, call)
    errors = {}
    for precision in ("int8", "int4"):
        model.enable_sparse_attention(config(dense_steps=1.0, dense_quantization=precision, strict=True))
        errors[precision] = float((run(model, call) - stock).norm() / stock.norm())
        report = report_of(model)
        assert report.dense_reasons == {f"early step, in {precision}": report.num_layers}
        assert (report.sparse_calls, report.density, report.precisions) == (0, None, {})
        model.disable_sparse_attention()
    assert 0 < errors["int8"] < errors["int4"] < 0.1
    assert torch.equal(run(model, call), stock)


def test_dense_layers_too_and_sparse_calls_stay_as_they_are(model, call):
    of_steps = {"dense_steps": 0.0, "quantization": "int8"}
    model.enable_sparse_attention(config(dense_layers=(1,), dense_quantization="int8_fp8", **of_steps))
    run_steps(model, call)
    report = report_of(model)
    assert report.dense_reasons == {"dense layer, in int8_fp8": 3}
    assert report.precisions == {"int8": 6}
    assert report.density == pytest.approx(0.3, abs=0.15)


def test_the_first_steps_are_dense_in_that_precision_and_later_ones_sparse():
    session, inputs = session_of(dense_steps=0.2), qkv()
    for index in range(5):
        begin(session, index, of=5)
        output = session.attend(0, *inputs, None, None)
        expected = in_full(*inputs, precision="int8")
        assert torch.equal(output, expected) == (index == 0)
    assert session.tallies[0].dense_reasons == {"early step, in int8": 1}
    assert session.tallies[0].precisions == {"native": 4}


def test_padded_text_is_hidden(model, call):
    session, inputs = session_of(dense_steps=1.0), qkv()
    begin(session, 0)
    mask = torch.arange(30)[None] < 25
    output = session.attend(0, *inputs, mask, None)
    # Rounding to INT8 takes the same for all keys of a block, those that are hidden left out.
    expected = in_full(*inputs, precision="int8", key_length=torch.tensor([25], dtype=torch.int32))
    assert torch.equal(output, expected)


def test_what_the_kernel_cannot_take_is_dense_whatever_strict_says():
    session = session_of(dense_steps=1.0, strict=True)
    begin(session, 0)
    assert session.attend(0, *qkv(), torch.ones(1, 1, 30, 30, dtype=torch.bool), None) is None
    assert session.attend(0, *qkv(torch.float64), None, None) is None
    assert session.tallies[0].dense_reasons == {
        "early step, and attention mask": 1,
        "early step, and torch.float64, which no backend computes in": 1,
    }


def test_short_sequences_are_left_to_the_model(model, call):
    assert is_stock(model, call, config(min_tokens=10**6, dense_steps=1.0, dense_quantization="int8"), "early step")


def test_a_strategy_that_keeps_a_layer_dense_leaves_it_to_the_model(model, call):
    quantized = diffsparse.SparseAttentionConfig(DENSE.strategy, 0.0, min_tokens=0, dense_quantization="int8")
    assert is_stock(model, call, quantized, "the strategy keeps it dense")


@pytest.mark.parametrize(("seconds", "is_used"), [(0.7, True), (0.9, False)])
def test_where_it_is_hardly_faster_the_model_computes(model, call, monkeypatch, caplog, seconds, is_used):
    monkeypatch.setattr(speed_check, "_SPEED_UPS", {})
    monkeypatch.setattr(speed_check, "LEAST_SPEED_UP", 1.2)
    monkeypatch.setattr(diffsparse.config, "MIN_TOKENS", 0)
    timed = iter([1.0, seconds, 0.0] * speed_check.LEAST_ROUNDS)
    monkeypatch.setattr(speed_check, "seconds_of", lambda compute, device: compute() is None or next(timed))
    monkeypatch.setattr(speed_check, "ENOUGH_SECONDS", 0.0)
    quantized = config(min_tokens=None, dense_steps=1.0, dense_quantization="int8")
    why = "the kernel in int8 is 1.11x as fast as dense attention here"
    with caplog.at_level(logging.WARNING, logger="diffsparse"):
        if is_used:
            model.enable_sparse_attention(quantized)
            run(model, call)
            assert report_of(model).dense_reasons == {"early step, in int8": 3}
        else:
            assert is_stock(model, call, quantized, f"early step, and {why}")
    assert next(timed, None) is None
    assert [why in record.getMessage() for record in caplog.records] == ([] if is_used else [True])


def test_dense_and_sparse_calls_are_timed_apart(monkeypatch):
    monkeypatch.setattr(speed_check, "_SPEED_UPS", {})
    monkeypatch.setattr(speed_check, "LEAST_SPEED_UP", 1.2)
    monkeypatch.setattr(speed_check, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(speed_check, "ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(diffsparse.config, "MIN_TOKENS", 0)
    timed = iter([1.0, 0.9, 0.0, 1.0, 0.5, 0.0])
    monkeypatch.setattr(speed_check, "seconds_of", lambda compute, device: next(timed))
    session = session_of(dense_steps=0.5, min_tokens=None, quantization="int8")
    for index in range(2):
        begin(session, index, of=2)
        session.attend(0, *qkv(), None, None, dense=lambda: None)
    why = "the kernel in int8 is 1.11x as fast as dense attention here"
    assert session.tallies[0].dense_reasons == {f"early step, and {why}": 1}
    assert session.tallies[0].sparse_calls == 1


def test_a_precision_that_the_backend_lacks_is_an_error_at_the_first_call(model, call, monkeypatch):
    def why_not(query, query_block_size, key_block_size, precision="native"):
        return "no FP8 here" if precision == "fp8" else None

    monkeypatch.setattr(block_sparse_eager, "why_not", why_not)
    model.enable_sparse_attention(config(quantization="int8", dense_quantization="fp8"))
    with pytest.raises(ValueError, match=r"`dense_quantization` 'fp8' .* eager: no FP8 here"):
        run(model, call)


@pytest.mark.parametrize(("largest", "expected"), [(128, 128), (64, 64), (32, 64)])
def test_blocks_are_the_largest_that_the_backend_takes(monkeypatch, largest, expected):
    # What takes neither is said of where it is computed.
    monkeypatch.setattr(
        block_sparse_eager, "why_not", lambda query, *sizes: "too large" if max(sizes) > largest else None
    )
    mask = AllBlocks("eager").plan(*qkv(), None).mask
    assert (mask.query_block_size, mask.key_block_size) == (expected, expected)
    assert float(mask.density) == 1.0


def test_a_slower_backend_that_takes_larger_blocks_does_not_take_the_place_of_a_faster_one(monkeypatch):
    pytest.importorskip("triton")

    def why_not(name, query, query_block_size, key_block_size, precision):
        takes = name == "eager" or (name == "triton" and query_block_size == 64)
        return None if takes else "too little memory"

    monkeypatch.setattr(block_sparse, "why_not", why_not)
    assert AllBlocks(precision="int8").plan(*qkv(), None).mask.query_block_size == 64


def test_the_size_of_blocks_is_asked_once_of_the_backend_that_computes_in_its_precision(monkeypatch):
    asked = []
    monkeypatch.setattr(all_blocks, "pick_backend", lambda *of: asked.append(of) or block_sparse_eager)
    session = session_of(dense_steps=1.0, backend="eager", replan_every=1)
    for index in range(3):
        begin(session, index)
        session.attend(0, *qkv(), None, None)
    assert [(backend, precision) for backend, *_, precision in asked] == [("eager", "int8")] * 2


class Family:
    name, padding_mask, text_apart = "padded text", True, None


def session_of(**changes):
    return Session("model", Family(), ("only",), config(SPARSE.strategy, dense_quantization="int8", **changes))


def begin(session, index, of=20):
    session.begin(Step(index, of, "cond", index == 0, branch_is_named=True), (2, 3, 5, 0, None))


def qkv(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 30, 8, generator=generator).to(dtype) for _ in range(3)]


def in_full(query, key, value, **options):
    lists, counts = torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 1, dtype=torch.int32)
    sizes = {"query_block_size": 128, "key_block_size": 128}
    return block_sparse_attention(query, key, value, lists, counts, **sizes, **options)


def is_stock(model, call, chosen, reason):
    """Whether the model computes all by itself, and this is why."""
    stock = run(model, call)
    model.enable_sparse_attention(chosen)
    output, report = run(model, call), report_of(model)
    return torch.equal(output, stock) and report.dense_reasons == {reason: report.num_layers}

"""Which attention stays dense, with its reason in the report, or an error where the config is strict."""

import diffusers
import pytest
import torch
from enabled import DENSE, FULL, SPARSE, config, report_of, run
from tiny_models import TINY

import diffsparse
from diffsparse import Adaptive, DenseFallback
from diffsparse.pipelines.left_alone import LEFT_ALONE

FLUX = pytest.mark.parametrize("tiny", ["flux"], indirect=True)


@pytest.fixture
def tiny(request):
    return TINY[getattr(request, "param", "wan")]


def stays_dense(model, call, reason, chosen=SPARSE):
    """Whether all of a call is dense for this reason, and gives what it gives stock."""
    stock = run(model, call)
    model.enable_sparse_attention(chosen)
    output, report = run(model, call), report_of(model)
    return torch.equal(output, stock) and report.dense_reasons == {reason: report.num_layers}


@pytest.mark.parametrize("backend", [None, "triton"])
def test_head_dim_above_256_runs_dense(backend):
    model = TINY["wan"].make(num_attention_heads=1, attention_head_dim=260, num_layers=1)
    call = TINY["wan"].call(model, (1, 5, 7))
    assert stays_dense(model, call, "head dim 260 above 256", config(backend=backend))


def test_float64_runs_dense():
    model = TINY["wan"].make().double()
    call = TINY["wan"].call(model, (3, 7, 5))
    call = {name: x.double() if x.is_floating_point() else x for name, x in call.items()}
    assert stays_dense(model, call, "torch.float64, which no backend computes in")


def test_a_mask_of_all_pairs_runs_dense():
    # SkyReels-V2 where it generates block by block.
    model = TINY["skyreels_v2"].make(num_frame_per_block=3)
    call = TINY["skyreels_v2"].call(model, (6, 3, 3))
    assert stays_dense(model, call, "attention mask")


def test_a_call_that_does_not_say_its_sizes_runs_dense():
    model = TINY["ltx"].make()
    call = TINY["ltx"].call(model, (3, 7, 5))
    # Coordinates as LTXConditionPipeline passes them, but of tokens that make no grid.
    for name in ("num_frames", "height", "width"):
        del call[name]
    call["video_coords"] = torch.rand(1, 3, 3 * 7 * 5)
    assert stays_dense(model, call, "the call does not say the size of the grid")


def test_strict_raises_at_the_first_fallback_and_the_model_is_usable(model, call):
    model.enable_sparse_attention(config(strict=True))
    good = run(model, call)
    broken = call | {"hidden_states": torch.full_like(call["hidden_states"], torch.nan)}
    with pytest.raises(DenseFallback, match=r"blocks\.0\.attn1.*NaN.*strict=False"):
        run(model, broken)
    assert report_of(model).dense_calls == 1
    assert torch.equal(run(model, call), good)


def test_quantization_is_another_result_and_reported(model, call):
    stock = run(model, call)
    errors = {}
    for quantization in (None, "int8", "int4"):
        model.enable_sparse_attention(
            config(FULL.strategy, quantization=quantization, dense_layers=(0,), min_tokens=0, strict=True)
        )
        errors[quantization] = float((run(model, call) - stock).norm() / stock.norm())
        assert report_of(model).precisions == {quantization or "native": 2}
        model.disable_sparse_attention()
    assert errors[None] < errors["int8"] < errors["int4"] < 0.1


def test_quantization_that_the_backend_lacks_is_an_error_at_the_first_call(model, call, monkeypatch):
    monkeypatch.setattr("diffsparse.kernels.block_sparse_eager.why_not", lambda query, *sizes: None)
    # Early steps are dense: nobody should wait for the error until they are done.
    model.enable_sparse_attention(config(quantization="fp8", dense_steps=1.0))
    with pytest.raises(ValueError, match=r"`quantization` 'fp8' .* eager: it does not compute in fp8"):
        run(model, call)
    model.disable_sparse_attention()
    model.enable_sparse_attention(config(dense_steps=0.0))
    run(model, call)


def test_a_backend_that_cannot_run_is_an_error_at_the_first_call(model, call):
    # As for quantization: nobody should wait for the error until the early steps are done.
    model.enable_sparse_attention(config(backend="triton", dense_steps=1.0))
    with pytest.raises(ValueError, match=r"`backend` 'triton' cannot run here: .* needs a CUDA GPU.*Leave it out"):
        run(model, call)
    # What no backend computes is dense all the same.
    model = model.double()
    with torch.no_grad():
        model(**{name: x.double() for name, x in call.items()})
    assert set(report_of(model).dense_reasons) == {"early step"}


def test_a_named_backend_is_asked_about_once(model, call, monkeypatch):
    asked = []
    monkeypatch.setattr("diffsparse.session.pick_backend", lambda *args: asked.append(args))
    model.enable_sparse_attention(config(backend="eager", dense_steps=1.0))
    for _ in range(2):
        run(model, call)
    assert len(asked) == 1


def test_a_backend_that_takes_one_size_of_query_blocks_may_be_named_for_quantization(model, call, monkeypatch):
    # As Hopper's kernel does.
    def why_not(query, query_block_size, key_block_size, precision="native"):
        return None if query_block_size == 128 else f"a query block of {query_block_size} tokens is not 128"

    monkeypatch.setattr("diffsparse.kernels.block_sparse_eager.why_not", why_not)
    strategy = Adaptive(query_block_size=128, key_block_size=64)
    model.enable_sparse_attention(config(strategy, backend="eager", quantization="int8"))
    run(model, call)
    assert report_of(model).precisions == {"int8": 3}


def test_where_no_backend_is_right_all_is_dense_by_that_reason(model, call, monkeypatch):
    # As with float32 on a GPU without Triton, perhaps, once its products may be in TF32.
    why = "its self-test is off by 5.0e-04, 1.0e-04 is allowed"
    monkeypatch.setattr("diffsparse.kernels.block_sparse._why_not_right", lambda *call: why)
    stock = run(model, call)
    model.enable_sparse_attention(config())
    assert torch.equal(run(model, call), stock)
    ((reason, count),) = report_of(model).dense_reasons.items()
    assert reason.startswith(f"no backend is right here: gluon: {why}; triton: {why}")
    assert f"eager: {why}" in reason
    assert count == 3
    model.disable_sparse_attention()
    model.enable_sparse_attention(config(strict=True))
    with pytest.raises(diffsparse.DenseFallback, match="no backend is right here"):
        run(model, call)


def test_that_a_backend_is_right_is_asked_once(model, call, monkeypatch):
    asked = []
    monkeypatch.setattr("diffsparse.session.why_none", lambda *call: asked.append(call))
    model.enable_sparse_attention(config())
    for _ in range(2):
        run(model, call)
    assert len(asked) == 1


def test_policy_is_no_fallback(model, call):
    for chosen in ({"dense_steps": 1.0}, {"dense_layers": (0, 1, 2)}, {"min_tokens": 10_000}):
        model.enable_sparse_attention(config(strict=True, **chosen))
        run(model, call)
        assert report_of(model).dense_calls == 3
        model.disable_sparse_attention()


def test_a_transformer_left_alone_says_why(warnings):
    model = type("LatteTransformer3DModel", (torch.nn.Identity,), {})()
    diffsparse.enable_sparse_attention(model, SPARSE)
    assert warnings() == [f"LatteTransformer3DModel stays dense: {LEFT_ALONE['LatteTransformer3DModel']}."]
    assert report_of(model).num_layers == 0
    diffsparse.disable_sparse_attention(model)


def test_a_processor_with_weights_of_its_own_keeps_it(model, call, warnings):
    class Adapter(torch.nn.Module):
        def __init__(self, stock):
            super().__init__()
            self.stock = stock

        def forward(self, attn, *args, **kwargs):
            return self.stock(attn, *args, **kwargs)

    stock = run(model, call)
    model.blocks[1].attn1.processor = Adapter(model.blocks[1].attn1.processor)
    model.enable_sparse_attention(DENSE)
    assert torch.equal(run(model, call), stock)
    assert ["blocks.1.attn1" in warning for warning in warnings()] == [True]
    assert report_of(model).unreached_layers == {"its processor cannot be made sparse": 1}
    model.disable_sparse_attention()
    assert isinstance(model.blocks[1].attn1.processor, Adapter)


@FLUX
def test_a_processor_made_anew_by_a_loader_runs_dense(model, call):
    stock = run(model, call)
    model.enable_sparse_attention(SPARSE)
    # As diffusers' IP-Adapter loader does.
    model.set_attn_processor({name: type(p)() for name, p in model.attn_processors.items()})
    assert torch.equal(run(model, call), stock)
    assert report_of(model).unreached_layers == {"its processor was replaced after enabling": 4}
    model.disable_sparse_attention()
    assert torch.equal(run(model, call), stock)


@FLUX
def test_layers_whose_processor_is_replaced_are_reported_and_strict_refuses_them(model, call):
    reason = "its processor was replaced after enabling"
    model.enable_sparse_attention(SPARSE)
    run(model, call)
    assert report_of(model).unreached_layers == {}
    assert "not counted" not in str(diffsparse.sparse_attention_report(model))
    model.transformer_blocks[1].attn.set_processor(type(model.transformer_blocks[0].attn.processor)())
    run(model, call)
    report = report_of(model)
    assert report.unreached_layers == {reason: 1}
    assert (report.sparse_calls, report.dense_calls) == (4 + 3, 0)
    assert f"not counted: {reason}" in str(diffsparse.sparse_attention_report(model))
    model.disable_sparse_attention()

    model.enable_sparse_attention(config(strict=True))
    run(model, call)
    model.transformer_blocks[1].attn.set_processor(diffusers.models.transformers.transformer_flux.FluxAttnProcessor())
    with pytest.raises(DenseFallback, match=rf"transformer_blocks\.1\.attn.*{reason}.*strict=False"):
        run(model, call)


@FLUX
def test_layers_whose_processor_is_replaced_for_a_while_are_reported_until_the_next_call(model, call):
    model.enable_sparse_attention(SPARSE)
    # As pipelines with perturbed attention guidance do, which put ours back at their end.
    ours = model.attn_processors
    model.transformer_blocks[1].attn.set_processor(diffusers.models.transformers.transformer_flux.FluxAttnProcessor())
    run(model, call)
    model.set_attn_processor(ours)
    assert report_of(model).unreached_layers == {"its processor was replaced after enabling": 1}
    run(model, call)
    assert report_of(model).unreached_layers == {}


def test_a_large_sum_in_half_precision_is_not_taken_for_infinity():
    from diffsparse.session import _is_finite

    half = torch.full((1, 2, 4096, 64), 0.5, dtype=torch.float16)
    assert _is_finite(half, half, half)

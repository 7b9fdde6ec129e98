"""Enabling, running and disabling sparse attention on tiny models of every family, and on a whole pipeline."""

import copy
import dataclasses
import gc
import io
import itertools
import json
import logging
import pickle
import threading
import weakref
from collections import Counter

import diffusers
import pytest
import torch
from enabled import DENSE, FULL, SPARSE, config, forward, report_of, run
from tiny_models import TINY, generate, tiny_wan_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffsparse
from diffsparse import Adaptive, DenseFallback
from diffsparse.pipelines.families import find_family
from diffsparse.pipelines.left_alone import LEFT_ALONE
from diffsparse.strategies.dense import Dense


def steps(model, call, count=3):
    """The call at falling timesteps, as a denoising loop makes them."""
    name = find_family(model).timestep
    return [call | {name: call[name] * (count - step) / count} for step in range(count)]


def run_steps(model, call, count=3):
    return torch.stack([run(model, each) for each in steps(model, call, count)])


def num_calls(tiny):
    """Attention calls of a call of the transformer with two rows."""
    return len(tiny.layers) * tiny.calls_per_layer


def surroundings(model):
    """Everything on a model that enabling could touch: attributes, processors, hooks."""
    return {
        name: (
            type(module),
            sorted(key for key in vars(module)),
            type(getattr(module, "processor", None)),
            dict(vars(getattr(module, "processor", object))),
            [len(hooks) for key, hooks in sorted(vars(module).items()) if key.endswith(("_hooks", "_kwargs"))],
        )
        for name, module in model.named_modules()
    }


@pytest.fixture(params=TINY)
def tiny(request):
    return TINY[request.param]


# What does not depend on how a model lays out its tokens is tried on one model for each way to attention.
each_way_to_attention = pytest.mark.parametrize("tiny", [name for name in TINY if TINY[name].compiled], indirect=True)


@pytest.fixture
def model(tiny):
    return tiny.make()


@pytest.fixture
def call(tiny, model):
    return tiny.call(model, tiny.grid, batch=2)


@pytest.fixture
def pipeline():
    return tiny_wan_pipeline()


@pytest.fixture
def warnings(caplog):
    """What diffsparse warns of."""
    caplog.set_level(logging.WARNING, logger="diffsparse")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("diffsparse")]


# --- every family: exactness


def test_a_dense_policy_is_bit_equal_to_stock(model, call):
    stock = run_steps(model, call)
    model.enable_sparse_attention(DENSE)
    assert torch.equal(run_steps(model, call), stock)


def test_full_density_is_as_exact_as_stock(tiny, model, call):
    calls = [call]
    if tiny.in_float64:
        exact = run(tiny.make().double(), _as_double(call))
    else:
        # Another order of the same sums in float32 is as far off as ours may be.
        with sdpa_kernel(SDPBackend.MATH):
            exact = run(model, call)
        # Where a layer rounds to bfloat16, as in Kandinsky 5, the order can decide which way. So can other last bits.
        calls += [call | {tiny.latents: _other_last_bits(call[tiny.latents], seed)} for seed in range(8)]
    stock_error = max((run(model, each) - exact).abs().max() for each in calls)
    model.enable_sparse_attention(FULL)
    error = (run(model, call) - exact).abs().max()
    # Both sum the same products in float32, in another order.
    assert error <= 4 * stock_error
    assert report_of(model).density == 1


@pytest.mark.parametrize("tiny", [name for name in TINY if not TINY[name].in_float64], indirect=True)
def test_the_last_layer_alone_at_full_density_is_as_exact_as_stock(tiny, model, call):
    # No layer after it rounds what it gives.
    with sdpa_kernel(SDPBackend.MATH):
        exact = run(model, call)
    stock_error = (run(model, call) - exact).abs().max()
    model.enable_sparse_attention(dataclasses.replace(FULL, dense_layers=tuple(range(len(tiny.layers) - 1))))
    error = (run(model, call) - exact).abs().max()
    assert error <= 4 * stock_error
    assert report_of(model).sparse_calls == tiny.calls_per_layer


def test_sparse_attention_is_sparse_and_another_result(model, call):
    stock = run_steps(model, call)
    model.enable_sparse_attention(SPARSE)
    sparse = run_steps(model, call)
    assert sparse.isfinite().all()
    assert (sparse - stock).abs().amax(dim=tuple(range(1, stock.ndim))).min() > 1e-4
    assert report_of(model).density < 0.9


def test_disabled_is_bit_equal_and_leaves_nothing_behind(model, call):
    before, stock = surroundings(model), run_steps(model, call)
    for _ in range(2):
        model.enable_sparse_attention(SPARSE)
        run_steps(model, call)
        model.disable_sparse_attention()
        assert surroundings(model) == before
        assert torch.equal(run_steps(model, call), stock)


def test_every_layer_of_every_call_is_counted_once(tiny, model, call):
    layers, calls = len(tiny.layers), tiny.calls_per_layer
    for chosen in (SPARSE, DENSE, config(dense_layers=(0, -1)), config(min_tokens=10_000)):
        model.enable_sparse_attention(chosen)
        run_steps(model, call, 3)
        report = report_of(model)
        assert report.family == find_family(model).name
        assert report.num_layers == layers
        assert report.sparse_calls + report.dense_calls == 3 * layers * calls
        assert report.dense_calls == sum(report.dense_reasons.values())
        assert len(report.layer_dense_reasons) == layers
        assert sum(map(Counter, report.layer_dense_reasons), Counter()) == report.dense_reasons
        expected = {SPARSE: 3 * layers, DENSE: 0}.get(chosen, 3 * (layers - 2) if chosen.dense_layers else 0)
        assert report.sparse_calls == expected * calls
        model.disable_sparse_attention()


def test_strict_raises_nothing_where_all_layers_run(model, call):
    model.enable_sparse_attention(config(strict=True))
    run_steps(model, call)
    assert report_of(model).dense_calls == 0


@each_way_to_attention
def test_nan_in_the_queries_goes_dense_and_is_counted(tiny, model, call):
    call[tiny.latents].view(2, -1)[:, 0] = torch.nan
    stock = run(model, call)
    model.enable_sparse_attention(SPARSE)
    assert torch.equal(run(model, call).isnan(), stock.isnan())
    report = report_of(model)
    assert report.sparse_calls == 0
    assert report.dense_reasons == {"NaN or infinity in query, key or value": num_calls(tiny)}


@each_way_to_attention
def test_gradients_run_dense_and_are_right(tiny, model, call):
    def gradients():
        model.requires_grad_(True).zero_grad()
        forward(model, call).square().sum().backward()
        return [p.grad for p in model.parameters()]

    stock = gradients()
    model.enable_sparse_attention(SPARSE)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients(), stock, strict=True))
    assert report_of(model).dense_reasons == {"gradients are required": num_calls(tiny)}
    run(model, call)
    assert report_of(model).sparse_calls == num_calls(tiny)


def test_another_resolution_runs_sparse_and_like_a_fresh_start(tiny, model, call):
    frames, height, width = tiny.grid
    # The second has as many tokens as the first: only the grid tells their plans apart.
    grids = [(frames, height, width), (frames, width, height), (frames, width + 2 * tiny.square, height + 2)]
    calls = [tiny.call(model, grid, batch=2) for grid in grids]
    name = find_family(model).timestep
    sequence = [calls[i] | {name: call[name] * (1 - 0.1 * n)} for n, i in enumerate((0, 1, 2, 0))]
    model.enable_sparse_attention(config(replan_every=100))
    alternating = [run(model, each) for each in sequence]
    assert report_of(model).dense_calls == 0
    for each, output in zip(sequence, alternating):
        model.disable_sparse_attention()
        model.enable_sparse_attention(SPARSE)
        assert torch.equal(run(model, each), output)


def test_positional_arguments_are_understood(tiny, model, call):
    model.enable_sparse_attention(SPARSE)
    positional = [call.pop(name) for name in tiny.positional]
    with torch.no_grad():
        model(*positional, **call)
    assert report_of(model).dense_calls == 0


@each_way_to_attention
def test_the_users_backend_stays_and_sparse_stays_on(tiny, model, call):
    for before in (True, False):
        if before:
            model.set_attention_backend("native")
        model.enable_sparse_attention(SPARSE)
        if not before:
            model.set_attention_backend("native")
        run(model, call)
        assert report_of(model).sparse_calls == num_calls(tiny)
        chosen = [getattr(m.processor, "_attention_backend", "native") for m in _layers(tiny, model)]
        assert {str(getattr(name, "value", name)) for name in chosen} == {"native"}
        model.disable_sparse_attention()
        model.reset_attention_backend()


def test_the_users_backend_is_the_dense_path(monkeypatch):
    from diffusers.models import attention_dispatch

    model = TINY["wan"].make()
    call = TINY["wan"].call(model, (3, 7, 5))
    used, stock = [], attention_dispatch.dispatch_attention_fn

    def record(*args, backend=None, **kwargs):
        used.append(backend)
        return stock(*args, backend=backend, **kwargs)

    # `set_attention_backend` sets the backend of the whole process as well, and nothing of diffusers sets it back.
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    model.enable_sparse_attention(DENSE)
    model.set_attention_backend("_native_math")
    # Cross-attention calls the function through its own module.
    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", record)
    run(model, call)
    model.reset_attention_backend()
    assert len(used) == 3
    assert {backend.value for backend in used} == {"_native_math"}


@each_way_to_attention
def test_copies_are_stock_and_the_original_stays_sparse(tiny, model, call):
    stock = run(model, call)
    model.enable_sparse_attention(SPARSE)
    sparse = run(model, call)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    )
    for twin in copies:
        assert not twin.is_sparse_attention_enabled
        assert all(not hasattr(m.processor, "_diffsparse_handle") for m in _layers(tiny, twin))
        torch.testing.assert_close(run(twin, call), stock)
        if hasattr(twin, "cache_context"):
            with twin.cache_context("cond"):
                run(twin, call)
        twin.enable_sparse_attention(SPARSE)
        torch.testing.assert_close(run(twin, call), sparse)
        assert report_of(twin).sparse_calls == num_calls(tiny)
    assert report_of(model).sparse_calls == num_calls(tiny)


@each_way_to_attention
def test_saving_leaves_no_trace(tiny, model, call, tmp_path):
    model.save_pretrained(tmp_path / "stock")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.enable_sparse_attention(SPARSE)
    run(model, call)
    model.save_pretrained(tmp_path / "enabled")
    assert list(model.state_dict()) == list(weights)
    stock, enabled = (_contents(tmp_path / name) for name in ("stock", "enabled"))
    for files in (stock, enabled):
        files["config.json"] = json.loads(files["config.json"])
        files["config.json"].pop("_name_or_path", None)
    assert stock == enabled
    loaded = type(model).from_pretrained(tmp_path / "enabled")
    assert all(type(m.processor).__module__.startswith("diffusers.") for m in _layers(tiny, loaded))
    assert not loaded.is_sparse_attention_enabled


# --- every family: torch.compile


@pytest.fixture
def dynamo():
    """torch.compile without what earlier tests compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo
    torch._dynamo.reset()


def compile_blocks(model, backend="eager"):
    """Regional compilation, as a user asks for it."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
    else:
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, backend=backend)


@each_way_to_attention
def test_regional_compile_makes_as_many_graphs_as_stock(tiny, model, call, dynamo):
    # Tracing through to autograd checks shapes and strides as well; once is enough.
    backend = "aot_eager" if tiny is TINY["wan"] else "eager"
    # Dense first, then sparse, with plans kept and made again: nothing of that may end up in a graph.
    dense_first = config(dense_layers=(0,), replan_every=2)
    graphs, outputs = [], []
    for compiled in (tiny.make(), model):
        if compiled is model:
            model.enable_sparse_attention(dense_first)
        compile_blocks(compiled, backend)
        outputs.append(run_steps(compiled, call, 4))
        graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
        dynamo.reset()
        dynamo.utils.counters.clear()
    assert graphs[0] == graphs[1] > 0
    assert report_of(model).sparse_calls == 4 * (len(tiny.layers) - 1) * tiny.calls_per_layer

    eager = tiny.make()
    eager.enable_sparse_attention(dense_first)
    torch.testing.assert_close(outputs[1], run_steps(eager, call, 4))
    assert not torch.allclose(outputs[1], outputs[0])


def test_steps_and_layers_add_no_graphs_however_many(dynamo):
    model = TINY["wan"].make(num_layers=12)
    call = TINY["wan"].call(model, (1, 4, 4))
    model.enable_sparse_attention(config(replan_every=1, dense_layers=(3,)))
    compile_blocks(model)
    run_steps(model, call, 10)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert report_of(model).sparse_calls == 10 * 11


def test_enabling_and_disabling_after_compiling_takes_effect(dynamo):
    model = TINY["wan"].make()
    call = TINY["wan"].call(model, (3, 7, 5))
    compile_blocks(model)
    stock = run_steps(model, call)
    model.enable_sparse_attention(SPARSE)
    sparse = run_steps(model, call)
    assert report_of(model).sparse_calls == 3 * 3
    assert not torch.allclose(sparse, stock)
    model.disable_sparse_attention()
    assert torch.equal(run_steps(model, call), stock)


def test_a_pipeline_with_a_compiled_transformer_runs_sparse(pipeline, dynamo):
    stock = generate(pipeline)
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    pipeline.enable_sparse_attention(SPARSE)
    assert not torch.allclose(generate(pipeline), stock)
    assert report_of(pipeline).sparse_calls == 3 * 2 * 2
    pipeline.disable_sparse_attention()
    torch.testing.assert_close(generate(pipeline), stock)


def compile_whole(model, way):
    if way == "torch.compile":
        return torch.compile(model, fullgraph=True, backend="eager")
    model.compile(fullgraph=True, backend="eager")
    return model


@pytest.mark.parametrize(
    ("way", "order"),
    [
        ("torch.compile", "enable, compile"),
        ("method", "compile, enable"),
        ("torch.compile", "compile, run, enable"),
    ],
)
def test_a_transformer_compiled_whole_sees_each_step_and_grid(way, order, dynamo):
    model = TINY["wan"].make(num_layers=1)
    videos = [steps(model, TINY["wan"].call(model, grid), 2) for grid in ((2, 3, 5), (2, 5, 3))]
    calls = [call for video in videos for call in video]
    early = config(dense_steps=0.1)
    stock = run(model, calls[0])
    model.enable_sparse_attention(early)
    expected = [run(model, call) for call in calls]
    model.disable_sparse_attention()

    whole = model
    for action in order.split(", "):
        if action == "compile":
            whole = compile_whole(model, way)
        elif action == "enable":
            diffsparse.enable_sparse_attention(whole, early)
        else:
            torch.testing.assert_close(run(whole, calls[0]), stock)
    for call, output in zip(calls, expected):
        torch.testing.assert_close(run(whole, call), output)
    report = report_of(whole)
    assert (report.sparse_calls, report.dense_reasons) == (2, {"early step": 2})
    diffsparse.disable_sparse_attention(whole)
    torch.testing.assert_close(run(whole, calls[0]), stock)


def test_a_compiled_function_around_the_transformer_is_refused_with_the_way_out(dynamo):
    model = TINY["wan"].make(num_layers=1)
    call = TINY["wan"].call(model, (1, 3, 5))
    model.enable_sparse_attention(SPARSE)
    around = torch.compile(lambda: run(model, call), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Compile the transformer itself"):
        around()


def test_attention_is_captured_in_no_cuda_graph():
    # A graph replays kernels alone: the plan of the call that was captured would be run for ever.
    assert torch.Tag.cudagraph_unsafe in torch.ops.diffsparse.attend.default.tags


# --- what stays dense, with its reason


def test_head_dim_above_256_runs_dense():
    model = TINY["wan"].make(num_attention_heads=1, attention_head_dim=260, num_layers=1)
    call = TINY["wan"].call(model, (1, 5, 7))
    stock = run(model, call)
    model.enable_sparse_attention(SPARSE)
    assert torch.equal(run(model, call), stock)
    assert report_of(model).dense_reasons == {"head dim 260 above 256": 1}


def test_a_mask_of_all_pairs_runs_dense():
    # SkyReels-V2 where it generates block by block.
    model = TINY["skyreels_v2"].make(num_frame_per_block=3)
    call = TINY["skyreels_v2"].call(model, (6, 3, 3))
    stock = run(model, call)
    model.enable_sparse_attention(SPARSE)
    assert torch.equal(run(model, call), stock)
    assert report_of(model).dense_reasons == {"attention mask": 3}


def test_a_call_that_does_not_say_its_sizes_runs_dense():
    model = TINY["ltx"].make()
    call = TINY["ltx"].call(model, (3, 7, 5))
    # As LTXConditionPipeline calls it.
    for name in ("num_frames", "height", "width"):
        del call[name]
    call["video_coords"] = torch.rand(1, 3, 3 * 7 * 5)
    stock = run(model, call)
    model.enable_sparse_attention(SPARSE)
    assert torch.equal(run(model, call), stock)
    assert report_of(model).dense_reasons == {"the call does not say the size of the grid": 3}


def test_strict_raises_at_the_first_fallback_and_the_model_is_usable():
    model = TINY["wan"].make()
    call = TINY["wan"].call(model, (3, 7, 5))
    model.enable_sparse_attention(config(strict=True))
    good = run(model, call)
    broken = call | {"hidden_states": torch.full_like(call["hidden_states"], torch.nan)}
    with pytest.raises(DenseFallback, match=r"blocks\.0\.attn1.*NaN.*strict=False"):
        run(model, broken)
    assert report_of(model).dense_calls == 1
    assert torch.equal(run(model, call), good)


def test_quantization_is_another_result_and_reported():
    model = TINY["wan"].make()
    call = TINY["wan"].call(model, (3, 7, 5))
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


def test_quantization_that_the_backend_lacks_is_an_error_at_the_first_call(monkeypatch):
    model = TINY["wan"].make()
    call = TINY["wan"].call(model, (3, 7, 5))
    monkeypatch.setattr("diffsparse.kernels.block_sparse_eager.why_not", lambda query, *sizes: None)
    # Early steps are dense: nobody should wait for the error until they are done.
    model.enable_sparse_attention(config(quantization="fp8", dense_steps=1.0))
    with pytest.raises(ValueError, match=r"`quantization` 'fp8' .* eager: it does not compute in fp8"):
        run(model, call)
    model.disable_sparse_attention()
    model.enable_sparse_attention(config(dense_steps=0.0))
    run(model, call)


def test_policy_is_no_fallback():
    model = TINY["wan"].make()
    call = TINY["wan"].call(model, (3, 7, 5))
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


def test_a_processor_with_weights_of_its_own_keeps_it(warnings):
    class Adapter(torch.nn.Module):
        def __init__(self, stock):
            super().__init__()
            self.stock = stock

        def forward(self, attn, *args, **kwargs):
            return self.stock(attn, *args, **kwargs)

    model = TINY["wan"].make()
    call = TINY["wan"].call(model, (3, 7, 5))
    stock = run(model, call)
    model.blocks[1].attn1.processor = Adapter(model.blocks[1].attn1.processor)
    model.enable_sparse_attention(DENSE)
    assert torch.equal(run(model, call), stock)
    assert ["blocks.1.attn1" in warning for warning in warnings()] == [True]
    assert report_of(model).unreached_layers == {"its processor cannot be made sparse": 1}
    model.disable_sparse_attention()
    assert isinstance(model.blocks[1].attn1.processor, Adapter)


def test_a_processor_made_anew_by_a_loader_runs_dense():
    model = TINY["flux"].make()
    call = TINY["flux"].call(model, (1, 7, 5))
    stock = run(model, call)
    model.enable_sparse_attention(SPARSE)
    # As diffusers' IP-Adapter loader does.
    model.set_attn_processor({name: type(p)() for name, p in model.attn_processors.items()})
    assert torch.equal(run(model, call), stock)
    assert report_of(model).unreached_layers == {"its processor was replaced after enabling": 4}
    model.disable_sparse_attention()
    assert torch.equal(run(model, call), stock)


def test_layers_whose_processor_is_replaced_are_reported_and_strict_refuses_them():
    model = TINY["flux"].make()
    call = TINY["flux"].call(model, (1, 7, 5))
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


# --- misuse


def test_enabling_twice_is_an_error_that_says_so(pipeline):
    for thing in (pipeline, pipeline.transformer):
        thing.enable_sparse_attention(SPARSE)
        with pytest.raises(ValueError, match=r"already enabled on .*disable_sparse_attention"):
            pipeline.enable_sparse_attention("fast")
        thing.disable_sparse_attention()


def test_an_expert_that_is_enabled_already_leaves_the_other_alone():
    pipeline = tiny_wan_pipeline(two_experts=True)
    pipeline.transformer_2.enable_sparse_attention(SPARSE)
    before = surroundings(pipeline.transformer)
    with pytest.raises(ValueError, match="transformer_2"):
        pipeline.enable_sparse_attention(SPARSE)
    assert surroundings(pipeline.transformer) == before


def test_a_transformer_under_two_names_is_one(pipeline, warnings):
    stock = generate(pipeline)
    pipeline.register_modules(transformer_2=pipeline.transformer)
    before = surroundings(pipeline.transformer)
    pipeline.enable_sparse_attention(SPARSE)
    assert warnings() == []
    generate(pipeline)
    assert report_of(pipeline).sparse_calls == 3 * 2 * 2
    pipeline.disable_sparse_attention()
    assert surroundings(pipeline.transformer) == before
    assert torch.equal(generate(pipeline), stock)


def test_disabling_when_off_is_a_warning(pipeline, warnings):
    pipeline.disable_sparse_attention()
    assert ["not enabled" in warning for warning in warnings()] == [True]


def test_wrong_things_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"names no preset.*'turbo'"):
        pipeline.enable_sparse_attention("turbo")
    with pytest.raises(TypeError, match="SparseAttentionConfig"):
        pipeline.enable_sparse_attention(Dense())
    with pytest.raises(TypeError, match="pipeline or a transformer, got str"):
        diffsparse.enable_sparse_attention("Wan-AI/Wan2.1")
    with pytest.raises(ValueError, match="not enabled"):
        pipeline.sparse_attention_report()
    with pytest.raises(ValueError, match=r"`dense_layers`.*layer 7.*2 self-attention layers"):
        pipeline.enable_sparse_attention(config(dense_layers=(7,)))
    assert not pipeline.is_sparse_attention_enabled
    assert surroundings(pipeline.transformer) == surroundings(tiny_wan_pipeline().transformer)


def test_a_pipeline_without_a_transformer_is_refused(pipeline):
    pipeline.transformer = None
    with pytest.raises(ValueError, match="no diffusion transformer"):
        pipeline.enable_sparse_attention()


def test_modular_pipelines_have_the_methods():
    for name in ("enable_sparse_attention", "disable_sparse_attention", "sparse_attention_report"):
        assert callable(getattr(diffusers.ModularPipeline, name))
    assert isinstance(diffusers.ModularPipeline.is_sparse_attention_enabled, property)


# --- a whole pipeline


def test_a_pipeline_runs_dense_sparse_and_dense_again(pipeline):
    stock = generate(pipeline)
    assert not pipeline.is_sparse_attention_enabled
    pipeline.enable_sparse_attention(DENSE)
    assert pipeline.is_sparse_attention_enabled
    assert torch.equal(generate(pipeline), stock)
    pipeline.disable_sparse_attention()
    pipeline.enable_sparse_attention(SPARSE)
    sparse = generate(pipeline)
    assert not torch.equal(sparse, stock)
    assert torch.equal(generate(pipeline), sparse)
    pipeline.disable_sparse_attention()
    assert torch.equal(generate(pipeline), stock)


def test_early_steps_are_dense_in_both_guidance_branches(pipeline):
    pipeline.enable_sparse_attention(config(dense_steps=0.4))
    for generations in (1, 2):
        generate(pipeline, steps=5)
        report = report_of(pipeline)
        assert report.dense_reasons == {"early step": generations * 2 * 2 * 2}
        assert report.sparse_calls == generations * 3 * 2 * 2


def test_both_experts_are_enabled_and_the_second_starts_late():
    pipeline = tiny_wan_pipeline(two_experts=True)
    pipeline.enable_sparse_attention(config(dense_steps=0.25))
    generate(pipeline, steps=8)
    first, second = pipeline.sparse_attention_report().transformers
    assert {first.name, second.name} == {"transformer", "transformer_2"}
    assert first.sparse_calls + first.dense_calls + second.sparse_calls + second.dense_calls == 8 * 2 * 2
    # Two of eight steps, wherever the first expert ends.
    assert first.dense_reasons == {"early step": 2 * 2 * 2}
    assert second.dense_calls == 0
    assert second.sparse_calls > 0


@pytest.mark.parametrize("order", ["enable, offload", "offload, enable"])
def test_a_second_call_after_offload_still_runs_sparse(pipeline, order):
    pipeline.enable_sparse_attention(SPARSE)
    expected = generate(pipeline)
    pipeline.disable_sparse_attention()
    for action in order.split(", "):
        if action == "enable":
            pipeline.enable_sparse_attention(SPARSE)
        else:
            # There is no accelerator to load onto; the hooks are the same.
            pipeline.enable_model_cpu_offload(device="cpu")
    for calls in (1, 2, 3):
        assert torch.equal(generate(pipeline), expected)
        assert report_of(pipeline).sparse_calls == calls * 3 * 2 * 2
        assert report_of(pipeline).dense_calls == 0
    pipeline.disable_sparse_attention()
    pipeline.remove_all_hooks()
    assert torch.equal(generate(pipeline), generate(tiny_wan_pipeline()))


def test_saving_a_pipeline_leaves_no_trace(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "stock")
    pipeline.enable_sparse_attention(SPARSE)
    generate(pipeline)
    pipeline.save_pretrained(tmp_path / "enabled")
    stock, enabled = (_contents(tmp_path / name) for name in ("stock", "enabled"))
    assert stock.keys() == enabled.keys()
    assert all(stock[name] == enabled[name] for name in stock if not name.endswith(".json"))
    for name in stock:
        if name.endswith(".json"):
            assert b"sparse" not in enabled[name].lower()
    loaded = diffusers.WanPipeline.from_pretrained(tmp_path / "enabled", local_files_only=True)
    assert not loaded.is_sparse_attention_enabled


def test_two_pipelines_in_two_threads_do_not_disturb_each_other():
    def made(seed, chosen):
        pipeline = tiny_wan_pipeline(seed)
        pipeline.enable_sparse_attention(chosen)
        return pipeline

    chosen = [config(dense_steps=0.5), config(Adaptive(density=0.6, query_block_size=32), replan_every=1)]
    arguments = [{"steps": 6, "prompt": "a cat"}, {"steps": 5, "prompt": "two dogs", "grid": (3, 4, 3)}]
    alone = [generate(made(seed, chosen[seed]), **arguments[seed]) for seed in (0, 1)]
    pipelines = [made(seed, chosen[seed]) for seed in (0, 1)]
    together = [[], []]
    start = threading.Barrier(2)

    def work(number):
        start.wait()
        for _ in range(3):
            together[number].append(generate(pipelines[number], **arguments[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        assert len(together[number]) == 3
        assert all(torch.equal(output, alone[number]) for output in together[number])
    first, second = (report_of(pipeline) for pipeline in pipelines)
    assert (first.sparse_calls, first.dense_calls) == (3 * 3 * 2 * 2, 3 * 3 * 2 * 2)
    assert (second.sparse_calls, second.dense_calls) == (3 * 5 * 2 * 2, 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", ["between steps", "in a layer", "in the strategy"])
def test_an_interrupted_generation_leaves_the_pipeline_usable(pipeline, error, place, monkeypatch):
    pipeline.enable_sparse_attention(SPARSE)
    expected = generate(pipeline)
    with monkeypatch.context() as patch:
        if place == "between steps":

            def interrupt(pipe, step, timestep, kwargs):
                if step == 1:
                    raise error("enough")
                return kwargs

            arguments = {"callback_on_step_end": interrupt}
        else:
            count, arguments = itertools.count(), {}
            owner, name = {
                "in a layer": (torch.nn.functional, "softmax"),
                "in the strategy": (Adaptive, "plan"),
            }[place]
            if place == "in a layer":
                owner, name = pipeline.transformer.blocks[1].attn1.to_q, "forward"
            stock = getattr(owner, name)

            def fail(*args, **kwargs):
                if next(count) == 1:
                    raise error("enough")
                return stock(*args, **kwargs)

            patch.setattr(owner, name, fail)
        with pytest.raises(error, match="enough"):
            generate(pipeline, **arguments)
    before = report_of(pipeline)
    assert torch.equal(generate(pipeline), expected)
    after = report_of(pipeline)
    assert after.sparse_calls - before.sparse_calls == 3 * 2 * 2
    pipeline.disable_sparse_attention()
    assert torch.equal(generate(pipeline), generate(tiny_wan_pipeline()))


def test_another_grid_and_another_number_of_steps_between_calls(pipeline):
    pipeline.enable_sparse_attention(SPARSE)
    small, large = generate(pipeline), generate(pipeline, grid=(3, 4, 5), steps=4)
    assert torch.equal(generate(pipeline), small)
    assert torch.equal(generate(pipeline, grid=(3, 4, 5), steps=4), large)
    assert report_of(pipeline).dense_calls == 0


def test_an_enabled_pipeline_is_freed():
    pipeline = tiny_wan_pipeline()
    pipeline.enable_sparse_attention(SPARSE)
    generate(pipeline)
    transformer = weakref.ref(pipeline.transformer)
    del pipeline
    gc.collect()
    assert transformer() is None


@pytest.fixture
def watched():
    """A config, and the plans made by it that anyone still keeps."""
    plans = weakref.WeakSet()

    class Watched(Adaptive):
        def plan(self, *args, **kwargs):
            plans.add(plan := super().plan(*args, **kwargs))
            return plan

    return config(Watched(query_block_size=16, key_block_size=16)), plans


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_plans_are_kept_for_one_generation_and_let_go_with_its_last_call(pipeline, watched, guidance_scale):
    chosen, plans = watched
    pipeline.enable_sparse_attention(chosen)
    kept = []

    def look(pipe, step, timestep, kwargs):
        gc.collect()
        kept.append(len(plans))
        return kwargs

    for grid in [(2, 3, 5), (3, 4, 5), (2, 3, 5)]:
        generate(pipeline, grid=grid, guidance_scale=guidance_scale, callback_on_step_end=look)
    # One for each layer, which the guidance branches share.
    assert kept == [2, 2, 0] * 3


def test_plans_of_an_interrupted_generation_go_with_the_next(pipeline, watched):
    chosen, plans = watched
    pipeline.enable_sparse_attention(chosen)

    def interrupt(pipe, step, timestep, kwargs):
        raise KeyboardInterrupt

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 1
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, callback_on_step_end=interrupt)
    generate(pipeline, callback_on_step_end=stop)
    gc.collect()
    assert len(plans) == 2
    generate(pipeline)
    gc.collect()
    assert len(plans) == 0


def test_a_plan_that_lasts_serves_the_rest_of_the_generation_and_no_other(pipeline):
    planned_at = []

    class LastsFromStepTwo(Adaptive):
        def plan(self, query, key, value, call):
            planned_at.append((call.layer, call.step))
            return dataclasses.replace(super().plan(query, key, value, call), lasts=call.step >= 2)

    pipeline.enable_sparse_attention(config(LastsFromStepTwo(query_block_size=16, key_block_size=16), replan_every=1))
    for _ in range(2):
        generate(pipeline, steps=6)
    assert planned_at == [(layer, step) for step in range(3) for layer in range(2)] * 2


def test_a_second_expert_plans_anew_where_the_generation_before_was_interrupted_shortly_before():
    planned_at = []

    class Watched(Adaptive):
        def plan(self, query, key, value, call):
            planned_at.append((call.layer, call.step))
            return super().plan(query, key, value, call)

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 3
        return kwargs

    pipeline = tiny_wan_pipeline(two_experts=True)
    pipeline.enable_sparse_attention(config(Watched(query_block_size=16, key_block_size=16)))
    generate(pipeline, steps=6, callback_on_step_end=stop)
    assert planned_at == [(layer, step) for step in (0, 3) for layer in range(2)]
    planned_at.clear()
    # The second expert begins at step 5 of 12, two behind the plans that it has left from the first generation.
    generate(pipeline, steps=12, prompt="two dogs")
    assert planned_at == [(layer, step) for step in (0, 4, 5, 9) for layer in range(2)]


def test_plans_of_a_bare_transformer_do_not_pile_up(watched):
    chosen, plans = watched
    model = TINY["wan"].make()
    call = TINY["wan"].call(model, (3, 7, 5))
    model.enable_sparse_attention(chosen)
    kept = []
    for _ in range(2):
        for _ in range(8):
            # The same timestep each time, as of a model that needs one step.
            run(model, call)
        gc.collect()
        kept.append(len(plans))
    assert kept[1] <= kept[0]


@pytest.mark.parametrize("cache_first", [False, True])
def test_a_cache_that_skips_blocks_does_not_confuse_the_layers(pipeline, cache_first):
    cache = diffusers.FirstBlockCacheConfig(threshold=0.0)
    pipeline.enable_sparse_attention(SPARSE)
    expected = generate(pipeline, steps=4)
    pipeline.disable_sparse_attention()
    if cache_first:
        pipeline.transformer.enable_cache(cache)
    pipeline.enable_sparse_attention(SPARSE)
    if not cache_first:
        pipeline.transformer.enable_cache(cache)
    assert torch.equal(generate(pipeline, steps=4), expected)
    assert report_of(pipeline).sparse_calls == 4 * 2 * 2
    pipeline.transformer.disable_cache()
    pipeline.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
    generate(pipeline, steps=4)
    # The first block runs at each step, the second at the first step alone.
    assert report_of(pipeline).sparse_calls == 4 * 2 * 2 + 2 * (4 + 1)
    assert report_of(pipeline).dense_calls == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_sparse(dtype):
    model = TINY["wan"].make().to(dtype)
    call = TINY["wan"].call(model, (3, 7, 5))
    call = {name: x.to(dtype) if x.is_floating_point() else x for name, x in call.items()}
    model.enable_sparse_attention(config(strict=True))
    output = run(model, call)
    assert output.dtype == dtype
    assert output.isfinite().all()


def test_a_large_sum_in_half_precision_is_not_taken_for_infinity():
    from diffsparse.session import _is_finite

    half = torch.full((1, 2, 4096, 64), 0.5, dtype=torch.float16)
    assert _is_finite(half, half, half)


def _layers(tiny, model):
    return [model.get_submodule(name) for name in tiny.layers]


def _other_last_bits(x, seed):
    """Numbers next to those of x in float32, or the same, by chance."""
    generator = torch.Generator().manual_seed(seed)
    return x * (1 + torch.randint(-1, 2, x.shape, generator=generator) * torch.finfo(x.dtype).eps)


def _as_double(value):
    if isinstance(value, dict):
        return {name: _as_double(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_as_double(part) for part in value]
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def _contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["to_q", "to_k", "to_v"])
def test_gradients_through_one_projection_alone_are_those_of_the_stock_model(name):
    model = TINY["wan"].make().requires_grad_(False)
    weight = getattr(model.blocks[0].attn1, name).weight.requires_grad_(True)
    call = TINY["wan"].call(model, (3, 7, 5))

    def gradient():
        return torch.autograd.grad(model(**call, return_dict=False)[0].square().sum(), weight)[0]

    stock = gradient()
    model.enable_sparse_attention(SPARSE)
    assert torch.equal(gradient(), stock)


def test_a_pipeline_without_a_transformer_can_be_asked_but_not_enabled():
    pipeline = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
        diffusers.DDPMScheduler(),
    )
    assert not pipeline.is_sparse_attention_enabled
    with pytest.raises(ValueError, match="no diffusion transformer"):
        pipeline.enable_sparse_attention()

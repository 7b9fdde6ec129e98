"""Sparse attention on a tiny model of every family: as exact as stock where it is to be, and gone when disabled."""

import copy
import dataclasses
import io
import json
import pickle
from collections import Counter

import pytest
import torch
from enabled import (
    DENSE,
    FULL,
    SPARSE,
    config,
    contents,
    each_way_to_attention,
    forward,
    num_calls,
    report_of,
    run,
    run_steps,
    surroundings,
)
from tiny_models import TINY
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffsparse.pipelines.families import find_family


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
    sequence = [calls[i] | {name: calls[i][name] * (1 - 0.1 * n)} for n, i in enumerate((0, 1, 2, 0))]
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
    stock, enabled = (contents(tmp_path / name) for name in ("stock", "enabled"))
    for files in (stock, enabled):
        files["config.json"] = json.loads(files["config.json"])
        files["config.json"].pop("_name_or_path", None)
    assert stock == enabled
    loaded = type(model).from_pretrained(tmp_path / "enabled")
    assert all(type(m.processor).__module__.startswith("diffusers.") for m in _layers(tiny, loaded))
    assert not loaded.is_sparse_attention_enabled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_sparse(dtype):
    model = TINY["wan"].make().to(dtype)
    call = TINY["wan"].call(model, (3, 7, 5))
    call = {name: x.to(dtype) if x.is_floating_point() else x for name, x in call.items()}
    model.enable_sparse_attention(config(strict=True))
    output = run(model, call)
    assert output.dtype == dtype
    assert output.isfinite().all()


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

from __future__ import annotations

import importlib
import sys
import types
from importlib.util import find_spec

import pytest
import torch
import vllm_omni_standins as standins

from diffsparse.grid import TokenGrid
from diffsparse.integrations import vllm_omni
from diffsparse.strategies.adaptive import Adaptive
from diffsparse.strategies.strategy import AttentionCall

# The fewest tokens that are not too few on a CPU, four of them a prefix.
GRID = TokenGrid(4, 31, 33, text_before=4)
B, H, S, D = 1, 2, GRID.num_tokens, 8
BACKEND = "diffsparse.integrations.vllm_omni_backend"


@pytest.fixture(params=["stand-in", "installed"])
def engine(request, monkeypatch):
    """The classes of release 0.30.0: ours that stand for them, and vLLM-Omni's own where it is installed."""
    if request.param == "stand-in":
        state = standins.install(monkeypatch)
    elif find_spec("vllm_omni") is None or find_spec("vllm") is None:
        pytest.skip("vLLM-Omni is not installed")
    else:
        state = types.SimpleNamespace(config=None)
    monkeypatch.delitem(sys.modules, BACKEND, raising=False)
    state.backend = importlib.import_module(BACKEND)
    if request.param == "installed":
        state.context_module = importlib.import_module("vllm_omni.diffusion.forward_context")
        monkeypatch.setattr(state.context_module, "_forward_context", None)
        monkeypatch.setattr(state.backend, "get_current_diffusion_config_or_none", lambda: state.config)
    state.abstract = importlib.import_module("vllm_omni.diffusion.attention.backends.abstract")
    monkeypatch.setattr(state.backend, "attn_fn", vllm_omni.make_attn_fn())
    yield state
    sys.modules.pop(BACKEND, None)


def layer_of(engine, prefix="blocks.3.attn1", causal=False, qkv_layout="BSND", **options):
    implementation = engine.backend.DiffSparseBackend.get_impl_cls()
    return implementation(
        num_heads=H,
        head_size=D,
        softmax_scale=D**-0.5,
        causal=causal,
        num_kv_heads=H,
        prefix=prefix,
        qkv_layout=qkv_layout,
        backend_kwargs=options or None,
        role="self",
        backend_explicit=True,
    )


def inputs():
    """Query, key and value, [B, S, H, D]."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, S, H, D, generator=generator) for _ in range(3))


def metadata(engine, mask=None, **layout):
    layout = layout or {"prefix_len": 4, "latent_grid": (4, 31, 33), "used_len": S}
    return engine.abstract.AttentionMetadata(attn_mask=mask, video_layout=engine.abstract.VideoTokenLayout(**layout))


def at(engine, step, total=20):
    if hasattr(engine, "context_module"):
        context = engine.context_module.create_forward_context(denoise_step_idx=step)
        engine.context_module._forward_context = context
        engine.context_module.set_forward_context_denoise_total_steps(total)
    else:
        engine.context = types.SimpleNamespace(denoise_step_idx=step, total_denoise_steps=total)


def dense(query, key, value, mask=None):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def ran(engine):
    """Sparse calls, and dense ones by reason."""
    (report,) = engine.backend.attn_fn.report().transformers
    return report.sparse_calls, report.dense_reasons


def test_a_video_runs_by_the_core(engine):
    at(engine, 5)
    qkv = inputs()
    output = layer_of(engine, sparsity=0.75, start_step=3, end_step=7).forward_cuda(*qkv, metadata(engine))
    query, key, value = (x.transpose(1, 2) for x in qkv)
    # Steps 3 to 12 are sparse, and 2.5 of these 10 are over in the middle of step 5.
    call = AttentionCall(GRID, step=5, num_steps=20, progress=0.25)
    plan = Adaptive(density=0.25).plan(query, key, value, call)
    assert torch.equal(output, plan.attend(query, key, value).transpose(1, 2))
    assert ran(engine) == (1, {})


@pytest.mark.parametrize(
    ("reason", "step", "options"),
    [
        ("early step", 1, {"start_step": 2}),
        ("late step", 18, {"end_step": 2}),
        ("dense layer", 5, {"skip_layers": [1, 3]}),
        ("the call does not say which step it is", None, {"start_step": 2}),
        ("sparsity 0", 5, {"sparsity": 0.0}),
    ],
)
def test_the_engines_options_keep_calls_dense(engine, reason, step, options):
    at(engine, step)
    qkv = inputs()
    output = layer_of(engine, **{"sparsity": 0.8, **options}).forward_cuda(*qkv, metadata(engine))
    torch.testing.assert_close(output, dense(*qkv))
    assert ran(engine) == (0, {reason: 1})


def test_the_first_and_the_last_sparse_step(engine):
    layer = layer_of(engine, sparsity=0.8, start_step=2, end_step=2, skip_layers=[2])
    for step in (2, 17):
        at(engine, step)
        layer.forward_cuda(*inputs(), metadata(engine))
    assert ran(engine) == (2, {})


def test_what_has_no_grid_is_dense(engine):
    at(engine, 5)
    layer, qkv = layer_of(engine, sparsity=0.8), inputs()
    seen = torch.arange(S)[None] < S - 7
    for given, mask in (
        (None, None),
        (metadata(engine, used_len=S), None),
        (metadata(engine, prefix_len=0, latent_grid=(4, 31, 33)), None),
        (metadata(engine, mask=seen), seen[:, None, None]),
    ):
        torch.testing.assert_close(layer.forward_cuda(*qkv, given), dense(*qkv, mask=mask))
    assert ran(engine) == (
        0,
        {
            "the call does not say the size of the grid": 1,
            "several videos in one sequence": 1,
            f"{S} tokens where the layout says {S - 4}": 1,
            "attention mask": 1,
        },
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qkv_layout", {"qkv_layout": "THD"}),
        ("precision", {"sparsity": 0.8, "precision": "fp8"}),
        ("density", {"sparsity": 1.0}),
    ],
)
def test_what_it_does_not_have_is_refused_when_a_layer_is_made(engine, name, settings):
    with pytest.raises(ValueError, match=f"`{name}`"):
        layer_of(engine, **settings)


def test_a_ring_is_refused(engine):
    engine.config = types.SimpleNamespace(parallel_config=types.SimpleNamespace(ring_degree=2))
    with pytest.raises(ValueError, match="`ring_degree` must be 1"):
        layer_of(engine, sparsity=0.8)


def test_a_mask_is_taken_on_the_platforms_that_it_runs_on(engine):
    backend = engine.backend.DiffSparseBackend
    assert backend.supports_attention_mask()
    assert backend.supported_platforms == ("cuda", "rocm")

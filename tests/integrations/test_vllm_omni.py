from __future__ import annotations

import configparser
import contextlib
import gc
import inspect
import logging
import weakref
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import vllm_omni_standins as standins

import diffsparse.config
from diffsparse import speed_check
from diffsparse.grid import TokenGrid
from diffsparse.integrations import vllm_omni
from diffsparse.integrations.vllm_omni import geometry_fn, make_attn_fn, read_config
from diffsparse.plan import AttentionPlan
from diffsparse.session import DenseFallback
from diffsparse.strategies.adaptive import Adaptive
from diffsparse.strategies.strategy import AttentionCall

B, H, S, D = 1, 2, 320, 16
GRID = TokenGrid(5, 8, 8)
# Of 20 steps with the preset's 20 % dense, the first that is sparse.
STATE = {
    "denoise_step_idx": torch.tensor([4]),
    "total_denoise_steps": torch.tensor([20]),
    "latent_shape": torch.tensor([[5, 16, 16]]),
    "patch_size": torch.tensor([[1, 2, 2]]),
}


def inputs(seed=0, heads=H, tokens=S):
    """Query, key and value, [B, S, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, tokens, H, D, generator=generator)
    key, value = (torch.randn(B, tokens, heads, D, generator=generator) for _ in range(2))
    return query, key, value


def exact(query, key, value, mask=None, scale=D**-0.5):
    """Attention in float64, [B, S, H, D]; `mask` [S, S] says what is seen."""
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value.double()).float()


def planned(query, key, value, density, step=4):
    """The same by the core alone."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    # Of 20 steps the last 16 are sparse, and a plan is for the one that it is made in.
    call = AttentionCall(GRID, step=step, num_steps=20, progress=(step - 4 + 0.5) / 16)
    plan = Adaptive(density=density).plan(query, key, value, call)
    return plan.attend(query, key, value).transpose(1, 2)


def ran(attn_fn):
    """Sparse calls, and dense ones by reason."""
    (report,) = attn_fn.report().transformers
    return report.sparse_calls, report.dense_reasons


def test_setup_names_the_function_to_the_engine():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    name, _, value = setup["options.entry_points"]["vllm_omni.sparse_attn"].strip().partition(" = ")
    found = EntryPoint(name, value, "vllm_omni.sparse_attn").load()
    assert (name, found) == ("diffsparse", vllm_omni.attn_fn)
    assert inspect.isfunction(found)


def test_all_blocks_give_exact_attention():
    attn_fn = make_attn_fn()
    layer = standins.Dispatcher(attn_fn, softmax_scale=0.3, density=1.0, min_tokens=0)
    qkv = inputs()
    torch.testing.assert_close(layer.forward(*qkv, STATE), exact(*qkv, scale=0.3))
    assert ran(attn_fn) == (1, {})


def test_the_dense_attention_of_the_call_is_what_sparse_attention_is_timed_against(monkeypatch):
    outputs = []

    def one_second(call, device):
        outputs.append(call())
        return 1.0

    monkeypatch.setattr(diffsparse.config, "MIN_TOKENS", 0)
    monkeypatch.setattr(speed_check, "_SPEED_UPS", {})
    monkeypatch.setattr(speed_check, "LEAST_SPEED_UP", 1.2)
    monkeypatch.setattr(speed_check, "seconds_of", one_second)
    layer = standins.Dispatcher(attn_fn := make_attn_fn(), softmax_scale=0.3)
    qkv = inputs()
    # Each call has a plan of its own, and bears the whole of it.
    for output in (layer.forward(*qkv, STATE), outputs[0]):
        torch.testing.assert_close(output, exact(*qkv, scale=0.3))
    assert ran(attn_fn) == (0, {"sparse attention is 0.50x as fast as dense attention here": 1})


@pytest.mark.parametrize("fails", [False, True])
def test_no_plan_outlives_its_call(monkeypatch, fails):
    plans = weakref.WeakSet()
    plan, attend = Adaptive.plan, AttentionPlan.attend

    def watched(*args):
        plans.add(made := plan(*args))
        return made

    def attend_or_fail(*args, **kwargs):
        if fails:
            raise torch.OutOfMemoryError
        return attend(*args, **kwargs)

    monkeypatch.setattr(Adaptive, "plan", watched)
    monkeypatch.setattr(AttentionPlan, "attend", attend_or_fail)
    layer = standins.Dispatcher(attn_fn := make_attn_fn(), density=0.5, min_tokens=0)
    with contextlib.suppress(torch.OutOfMemoryError):
        layer.forward(*inputs(), STATE)
    gc.collect()
    assert ran(attn_fn)[0] == (0 if fails else 1)
    assert len(plans) == 0


def test_each_call_runs_by_a_plan_of_its_own():
    attn_fn = make_attn_fn()
    layer = standins.Dispatcher(attn_fn, density=0.4, min_tokens=0)
    for seed in range(2):
        qkv = inputs(seed)
        output = layer.forward(*qkv, STATE)
        assert torch.equal(output, planned(*qkv, density=0.4))
        assert not torch.allclose(output, exact(*qkv), atol=1e-3)
    assert ran(attn_fn) == (2, {})


CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()
PADDED = torch.arange(S) < 300


@pytest.mark.parametrize(
    ("reason", "settings", "call", "mask", "heads"),
    [
        ("causal attention", {"causal": True}, {}, CAUSAL, H),
        ("attention mask", {}, {"attn_mask": PADDED[None]}, PADDED.expand(S, S), H),
        ("attention mask", {}, {"attn_mask": CAUSAL[None, None]}, CAUSAL, H),
        ("the call does not say the size of the grid", {}, {"state": STATE | {"latent_shape": None}}, None, H),
        ("the call does not say which step it is", {}, {"state": STATE | {"denoise_step_idx": None}}, None, H),
        (
            "320 tokens where the layout says 256",
            {},
            {"state": STATE | {"latent_shape": torch.tensor([[4, 16, 16]])}},
            None,
            H,
        ),
        (
            "the samples of the batch differ in size",
            {},
            {"state": STATE | {"latent_shape": torch.tensor([[5, 16, 16], [5, 8, 32]])}},
            None,
            H,
        ),
        # What is early for one sample is early for all.
        ("early step", {}, {"state": STATE | {"denoise_step_idx": torch.tensor([9, 3])}}, None, H),
        ("fewer than 321 tokens", {"min_tokens": 321}, {}, None, H),
    ],
)
def test_dense_calls_are_exact_and_counted(reason, settings, call, mask, heads):
    attn_fn = make_attn_fn()
    layer = standins.Dispatcher(attn_fn, **{"min_tokens": 0, **settings})
    qkv = inputs(heads=heads)
    torch.testing.assert_close(layer.forward(*qkv, **{"state": STATE, **call}), exact(*qkv, mask=mask))
    assert ran(attn_fn) == (0, {reason: 1})


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_heads_may_share_keys(density):
    attn_fn = make_attn_fn()
    layer, qkv = standins.Dispatcher(attn_fn, density=density, min_tokens=0), inputs(heads=1)
    assert torch.allclose(layer.forward(*qkv, STATE), exact(*qkv), atol=1e-5) == (density == 1)
    assert ran(attn_fn) == (1, {})


def test_gradients_flow_through_dense_attention():
    attn_fn = make_attn_fn()
    query, key, value = inputs()
    standins.Dispatcher(attn_fn, min_tokens=0).forward(query.requires_grad_(), key, value, STATE).sum().backward()
    assert query.grad is not None
    assert ran(attn_fn) == (0, {"gradients are required": 1})


def test_a_reason_is_logged_once(caplog):
    layer = standins.Dispatcher(make_attn_fn(), causal=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            layer.forward(*inputs(), STATE)
    assert [record.getMessage() for record in caplog.records] == [
        "diffsparse: some attention stays dense: causal attention"
    ]


def test_strict_raises():
    layer = standins.Dispatcher(make_attn_fn(), causal=True, strict=True)
    with pytest.raises(DenseFallback, match="causal attention"):
        layer.forward(*inputs(), STATE)


def test_spans_are_refused_by_the_dispatcher():
    layer = standins.Dispatcher(make_attn_fn())
    with pytest.raises(ValueError, match="supports_full_attn_spans"):
        layer.forward(*inputs(), STATE, full_attn_spans=[[(0, 4)]])


def test_other_keys_are_none_of_ours():
    attn_fn = make_attn_fn()
    standins.Dispatcher(attn_fn, min_tokens=0).forward(*inputs(), STATE, extra={"kv_cache_dtype": "fp8"})
    assert ran(attn_fn) == (1, {})


def test_compiled_code_has_no_step_in_it():
    attn_fn = make_attn_fn()
    layer = standins.Dispatcher(attn_fn, density=0.4, min_tokens=0)
    graphs, graphs_of_step = [], []
    compiled = torch.compile(
        lambda *args: 2 * layer.forward(*args), backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    qkv = inputs()
    for step in range(6):
        output = compiled(*qkv, STATE | {"denoise_step_idx": torch.tensor([step])})
        graphs_of_step.append(len(graphs))
    assert torch.equal(output, 2 * planned(*qkv, density=0.4, step=5))
    assert ran(attn_fn) == (2, {"early step": 4})
    assert set(graphs_of_step) == {graphs_of_step[0]}


@pytest.mark.parametrize("kind", [torch.tensor, lambda rows: rows, lambda rows: tuple(rows[0])])
def test_geometry_comes_as_a_tensor_or_as_numbers(kind):
    params = {"latent_shape": kind([[21, 90, 160]]), "patch_size": kind([[1, 2, 2]])}
    assert geometry_fn((1, 75600, 40, 128), params) == {"diffsparse_layout": (21, 45, 80, 0, 0)}


def test_options_make_a_config():
    config = read_config({"config": "fast", "density": 0.5, "dense_steps": 0.0, "strict": True, "topk": 0.3})
    assert (config.strategy, config.dense_steps, config.strict) == (Adaptive(density=0.5), 0.0, True)
    assert read_config({}).strategy == Adaptive(density=0.25)
    with pytest.raises(ValueError, match="names no preset: got 'faster'"):
        read_config({"config": "faster"})

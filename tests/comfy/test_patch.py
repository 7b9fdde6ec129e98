from __future__ import annotations

import contextlib
import gc
import logging
import sys
import types
import weakref

import comfy_standins as standins
import pytest
import torch

from diffsparse.plan import AttentionPlan
from diffsparse.session import LayerTally
from diffsparse.strategies.adaptive import Adaptive


def run(model, **kwargs):
    """Sample, and give what ran."""
    standins.sample(model, **kwargs)
    return model.get_attachment("diffsparse").report().transformers[0]


def counting(calls):
    def override(func, *args, **kwargs):
        calls.append(args[0].shape)
        return func(*args, **kwargs)

    return override


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_override_runs_what_is_dense_and_silences_nothing(when):
    calls: list = []
    model = standins.patcher()
    if when == "before":
        model.model_options["transformer_options"]["optimized_attention_override"] = counting(calls)
    sparse = standins.patched(model)
    if when == "after":
        sparse.model_options["transformer_options"]["optimized_attention_override"] = counting(calls)
    report = run(sparse)
    # Of 5 steps one is early. Self-attention of 2 layers: 8 calls sparse, 2 dense; 10 of cross-attention are dense.
    assert (report.sparse_calls, report.dense_calls) == (8, 2)
    assert len(calls) == 12


def test_options_are_left_as_they_were_after_each_call():
    model = standins.patched(standins.patcher())
    guider = standins.Guider(model)
    texts = {kind: torch.randn(1, 6, 32) for kind in (0, 1)}
    with torch.no_grad():
        guider.sample(torch.randn(1, 4, 3, 14, 10), torch.linspace(1, 0, 4), texts)
    assert len(guider.seen_options) == 3
    assert not any("optimized_attention_override" in options for options in guider.seen_options)


def test_what_another_node_has_set_is_not_kept():
    sparse = standins.patched(standins.patcher())
    other = sparse.clone()
    override = counting([])
    other.model_options["transformer_options"]["optimized_attention_override"] = override
    run(other)
    held = weakref.ref(override)
    del other, override
    gc.collect()
    assert held() is None


def test_text_is_not_taken_for_video():
    report = run(standins.patched(standins.patcher(standins.HunyuanVideo), start_percent=0.0))
    # Two joint layers, five steps; the text refiner counts for nothing.
    assert (report.sparse_calls, report.dense_calls) == (10, 0)


@pytest.mark.parametrize(
    ("settings", "steps", "reasons"),
    [
        ({"start_percent": 0.5}, 10, {"early step": 10}),
        ({"start_percent": 0.0, "end_percent": 0.8}, 10, {"late step": 2}),
        ({"preset": "balanced"}, 4, {"early step": 2}),
        ({"preset": "auto", "start_percent": 0.6}, 5, {"early step": 2}),
        ({"preset": "auto", "start_percent": 0.6}, 10, {"early step": 12}),
    ],
)
def test_steps_outside_the_window_stay_dense(settings, steps, reasons):
    assert run(standins.patched(standins.patcher(), **settings), steps=steps).dense_reasons == reasons


@pytest.mark.parametrize(("steps", "dense"), [(16, 4), (8, 1)])
def test_each_expert_of_two_knows_how_many_steps_both_have(steps, dense):
    early = []
    for first, end in ((1.0, 0.5), (0.5, 0.0)):
        guider = standins.Guider(standins.patched(standins.patcher(layers=1), preset="auto"))
        texts = {kind: torch.randn(1, 6, 32) for kind in (0, 1)}
        with torch.no_grad():
            guider.sample(torch.randn(1, 4, 3, 14, 10), torch.linspace(first, end, steps // 2 + 1), texts)
        report = guider.model_patcher.get_attachment("diffsparse").report().transformers[0]
        early.append(report.dense_reasons.get("early step", 0))
    assert early == [dense, 0]


def test_a_strategy_is_told_how_far_the_window_is_done(monkeypatch):
    told = []
    plan = Adaptive.plan
    monkeypatch.setattr(Adaptive, "plan", lambda *args: told.append(args[-1].progress) or plan(*args))
    # Sparse are steps 2 to 8, of which a plan serves 4 and the next one 3.
    run(standins.patched(standins.patcher(layers=1), start_percent=0.2, end_percent=0.85), steps=10)
    assert told == pytest.approx([2 / 7, 5.5 / 7])


def test_parts_of_a_schedule_that_another_node_samples_one_by_one_are_one_run(caplog):
    def in_parts(executor, latents, sigmas, *others):
        for first in range(0, len(sigmas) - 1, 2):
            latents = executor(latents, sigmas[first : first + 3], *others)
        return latents

    sparse = standins.patched(standins.patcher(), preset="auto", start_percent=0.4)
    whole = {steps: standins.sample(sparse, steps=steps) for steps in (8, 10)}
    sparse.add_wrapper_with_key("outer_sample", "parts", in_parts)
    with caplog.at_level(logging.INFO):
        assert all(torch.equal(standins.sample(sparse, steps=steps), latents) for steps, latents in whole.items())
    assert "DiffSparse: 7 of 8 steps sparse" in caplog.text
    assert "DiffSparse: 6 of 10 steps sparse" in caplog.text


def test_a_mask_keeps_attention_dense_and_is_counted():
    report = run(standins.patched(standins.patcher(mask=torch.zeros(400, 400))))
    assert report.dense_reasons == {"attention mask": 8, "early step": 2}


def test_branches_share_a_plan_whether_they_come_together_or_one_by_one(monkeypatch):
    made = []
    plan = Adaptive.plan
    monkeypatch.setattr(Adaptive, "plan", lambda *args: made.append(args) or plan(*args))
    # 4 sparse steps, replanned every 4: once for each of 2 layers.
    run(standins.patched(standins.patcher(layers=2)))
    together = len(made)
    run(standins.patched(standins.patcher(layers=2)), split=True)
    assert (together, len(made) - together) == (2, 2)


def test_branches_share_a_plan_in_the_next_run_too_where_one_prompt_has_changed(monkeypatch):
    made = []
    plan = Adaptive.plan
    monkeypatch.setattr(Adaptive, "plan", lambda *args: made.append(args) or plan(*args))
    sparse = standins.patched(standins.patcher(layers=2))
    first, second = (standins.Guider(sparse, split=True) for _ in range(2))
    second.uuids[0] = first.uuids[0]
    counts = []
    for guider in (first, second):
        texts = {kind: torch.randn(1, 6, 32) for kind in (0, 1)}
        with torch.no_grad():
            guider.sample(torch.randn(1, 4, 5, 20, 16), torch.linspace(1, 0, 6), texts)
        counts.append(len(made))
    assert counts == [2, 4]


@pytest.mark.parametrize("stops", [False, True])
def test_no_plan_outlives_its_run(monkeypatch, stops):
    plans = weakref.WeakSet()
    plan = Adaptive.plan

    def watched(*args):
        plans.add(made := plan(*args))
        return made

    monkeypatch.setattr(Adaptive, "plan", watched)
    kept = []

    def look(step):
        kept.append(len(plans))
        if stops and step == 2:
            raise Interrupted

    sparse = standins.patched(standins.patcher(layers=2))
    with contextlib.suppress(Interrupted):
        standins.sample(sparse, on_step=look)
    gc.collect()
    assert max(kept) == 2
    assert len(plans) == 0


@pytest.mark.parametrize("cross_attention_too", [True, False])
def test_attention_that_another_node_replaced_is_found_and_said(cross_attention_too, caplog):
    model = standins.patcher()
    block = model.diffusion_model.blocks[1]
    block.self_attn.forward = lambda x, *args, **kwargs: x
    if cross_attention_too:
        block.cross_attn.forward = block.self_attn.forward
    report = run(standins.patched(model, start_percent=0.0))
    assert report.sparse_calls == 5
    assert report.dense_reasons == {"another node has replaced the attention of its block": 5}
    assert "another node has replaced the attention of some blocks" in caplog.text


def test_blocks_that_their_model_tells_nothing_run_sparse_too(caplog):
    model = standins.patcher(standins.WanModel_S2V)
    dense = standins.sample(model)
    sparse = standins.patched(model)
    report = run(sparse)
    assert (report.sparse_calls, report.dense_reasons) == (8, {"early step": 2})
    assert "another node" not in caplog.text
    assert not torch.equal(standins.sample(sparse), dense)
    torch.testing.assert_close(standins.sample(standins.patched(model, density=1.0)), dense)
    assert torch.equal(standins.sample(model), dense)


def test_all_heads_are_sparse_where_another_node_takes_a_few_at_a_time():
    model = standins.head_by_head()
    dense = standins.sample(model)
    calls: list = []
    model.model_options["transformer_options"]["optimized_attention_override"] = counting(calls)
    report = run(standins.patched(model, start_percent=0.0))
    assert (report.sparse_calls, report.dense_calls) == (20, 0)
    # Cross-attention.
    assert len(calls) == 10
    torch.testing.assert_close(standins.sample(standins.patched(model, density=1.0)), dense)


class Interrupted(Exception):
    pass


def test_an_interrupt_leaves_the_model_as_it_was(caplog):
    def stop(step):
        if step == 2:
            raise Interrupted

    model = standins.patcher()
    dense = standins.sample(model)
    sparse = standins.patched(model)
    first = standins.sample(sparse)
    with caplog.at_level(logging.INFO), pytest.raises(Interrupted):
        standins.sample(sparse, on_step=stop)
    assert "DiffSparse: stopped in step 3 of 5: 2 of 3 steps sparse" in caplog.text
    assert torch.equal(standins.sample(model), dense)
    assert torch.equal(standins.sample(sparse), first)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GiB).")]
)
def test_out_of_memory_makes_the_rest_dense_and_is_counted(error, monkeypatch):
    tried = []

    def attend(*args, **kwargs):
        tried.append(args)
        raise error

    model = standins.patcher()
    dense = standins.sample(model)
    with monkeypatch.context() as patch:
        patch.setattr(AttentionPlan, "attend", attend)
        sparse = standins.patched(model)
        assert torch.equal(standins.sample(sparse), dense)
        report = sparse.get_attachment("diffsparse").report().transformers[0]
    assert report.dense_reasons == {"out of memory": 8, "early step": 2}
    assert report.sparse_calls == 0
    assert len(tried) == 1
    assert not torch.equal(standins.sample(sparse), dense)


def test_another_error_is_not_taken_for_too_little_memory(monkeypatch):
    def attend(*args, **kwargs):
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(AttentionPlan, "attend", attend)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        standins.sample(standins.patched(standins.patcher()))


def test_sparse_attention_stays_out_of_memory_that_comfyui_replays(monkeypatch):
    paused = []

    @contextlib.contextmanager
    def pause_malloc_graph(sync=False):
        paused.append(True)
        try:
            yield
        finally:
            paused.pop()

    prefetch = types.ModuleType("comfy.model_prefetch")
    prefetch.pause_malloc_graph = pause_malloc_graph
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", prefetch)
    seen = {"plan": [], "attend": [], "count": [], "dense": []}
    for kind, owner, name in (
        ("plan", Adaptive, "plan"),
        ("attend", AttentionPlan, "attend"),
        ("count", LayerTally, "count_sparse"),
    ):
        function = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, k=kind, f=function, **kwargs: seen[k].append(bool(paused)) or f(*args, **kwargs)
        )
    model = standins.patcher(layers=1)
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *args, **kwargs: (
        seen["dense"].append(bool(paused)) or func(*args, **kwargs)
    )
    run(standins.patched(model))
    # One plan for four sparse steps; one dense step, and cross-attention in all five.
    assert seen == {"plan": [True], "attend": [True] * 4, "count": [True] * 4, "dense": [False] * 6}
    assert paused == []


@pytest.mark.parametrize("ours_first", [True, False])
def test_steps_that_a_cache_answers_are_none(ours_first, caplog):
    model = standins.patcher()
    calls = []

    def cached(executor, *args, **kwargs):
        calls.append(len(calls))
        return torch.zeros_like(args[0]) if calls[-1] in (2, 4) else executor(*args, **kwargs)

    if not ours_first:
        model.add_wrapper_with_key("diffusion_model", "cache", cached)
    sparse = standins.patched(model)
    if ours_first:
        sparse.add_wrapper_with_key("diffusion_model", "cache", cached)
    with caplog.at_level(logging.INFO):
        report = run(sparse, steps=6)
    # Early are two of six steps, and two others the cache's.
    assert (report.sparse_calls, report.dense_calls) == (4, 4)
    assert "DiffSparse: 2 of 4 steps sparse" in caplog.text


def test_one_frame_is_an_image():
    report = run(standins.patched(standins.patcher(), start_percent=0.0), frames=1)
    assert report.sparse_calls == 10


def test_where_gradients_are_required_attention_stays_dense():
    model = standins.patched(standins.patcher(), start_percent=0.0)
    guider, texts = standins.Guider(model), {kind: torch.randn(1, 6, 32) for kind in (0, 1)}
    guider.sample(torch.randn(1, 4, 3, 14, 10), torch.tensor([1.0, 0.0]), texts).sum().backward()
    report = model.get_attachment("diffsparse").report().transformers[0]
    assert report.dense_reasons == {"gradients are required": 2}


def test_the_model_may_be_called_outside_a_sampler():
    model = standins.patched(standins.patcher())
    before = run(model)
    options = {"wrappers": model.wrappers, "sigmas": torch.ones(1), "sample_sigmas": torch.tensor([1.0, 0.0])}
    call = (torch.randn(1, 4, 5, 20, 16), torch.ones(1), torch.randn(1, 6, 32), None)
    with torch.no_grad():
        assert torch.equal(model.diffusion_model(*call, options), model.diffusion_model(*call, {}))
    assert model.get_attachment("diffsparse").report().transformers[0] == before


def test_a_model_that_another_node_calls_without_its_options_is_not_said_to_be_uncalled(caplog):
    def of_its_own(executor, *args):
        return executor(*args[:-1], {})

    model = standins.patcher()
    model.add_wrapper_with_key("apply_model", "other", of_its_own)
    dense = standins.sample(model)
    with caplog.at_level(logging.INFO):
        assert torch.equal(standins.sample(standins.patched(model)), dense)
    assert "another node calls the model in a way of its own" in caplog.text


@pytest.mark.parametrize("kind", [standins.WanModel, standins.WanModel_S2V])
def test_what_calls_the_model_while_it_is_sampled_and_says_no_step_stays_dense(kind, caplog):
    model = standins.patcher(kind)
    call = (torch.randn(1, 4, 5, 20, 16), torch.ones(1), torch.randn(1, 6, 32))
    dense = model.diffusion_model(*call)
    sparse = standins.patched(model, strict=True)

    def ask(step):
        assert torch.equal(model.diffusion_model(*call), dense)

    report = run(sparse, on_step=ask)
    assert (report.sparse_calls, report.dense_reasons) == (8, {"early step": 2})
    assert "another node" not in caplog.text


@pytest.mark.parametrize("kind", [standins.WanModel, standins.WanModel_S2V])
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_models_run_sparse_too(whole, kind):
    model = standins.patcher(kind)
    eager = standins.sample(standins.patched(model, start_percent=0.0))
    transformer = model.diffusion_model
    if whole:
        transformer.compile(backend="eager")
    else:
        for layer, block in enumerate(transformer.blocks):
            transformer.blocks[layer] = torch.compile(block, backend="eager")
    compiled = standins.patched(model, start_percent=0.0)
    torch.testing.assert_close(standins.sample(compiled), eager)
    assert compiled.get_attachment("diffsparse").report().transformers[0].sparse_calls == 10

"""Sparse attention over the generations of a whole pipeline, and what is left of it afterwards."""

import gc
import itertools
import threading
import weakref

import diffusers
import pytest
import torch
from enabled import DENSE, FULL, SPARSE, Watched, config, contents, report_of, run
from tiny_models import TINY, generate, tiny_wan_pipeline

from diffsparse import Adaptive, session


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
    stock, enabled = (contents(tmp_path / name) for name in ("stock", "enabled"))
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


@pytest.mark.parametrize("place", ["between two layers", "where a plan is made"])
def test_two_threads_may_call_one_transformer(place, monkeypatch):
    tiny = TINY["wan"]
    model = tiny.make()
    calls = [tiny.call(model, grid) for grid in [(3, 7, 5), (2, 3, 5)]]
    stock = [run(model, call) for call in calls]
    model.enable_sparse_attention(FULL)
    outputs = []
    other = threading.Thread(target=lambda: outputs.append(run(model, calls[1])))
    # Where a plan is made the other waits, or the plan would be made for its grid.
    owner, name, most_seconds = {
        "between two layers": (model.blocks[1].attn1.to_q, "forward", None),
        "where a plan is made": (session, "_is_finite", 0.2),
    }[place]
    original = getattr(owner, name)

    def call_in_between(*args):
        monkeypatch.setattr(owner, name, original)
        other.start()
        other.join(most_seconds)
        return original(*args)

    monkeypatch.setattr(owner, name, call_in_between)
    torch.testing.assert_close(run(model, calls[0]), stock[0])
    other.join()
    torch.testing.assert_close(outputs[0], stock[1])
    report = report_of(model)
    assert set(report.dense_reasons) <= {"another thread called the transformer meanwhile"}
    assert report.sparse_calls + report.dense_calls == 2 * len(tiny.layers)
    if place == "between two layers":
        assert (report.sparse_calls, report.dense_calls) == (1 + 3, 2)


def test_another_thread_makes_plans_of_its_own(monkeypatch):
    """It may be in the middle of another video."""
    tiny = TINY["wan"]
    model = tiny.make()
    call = tiny.call(model, (3, 7, 5))
    first, second, third = (call | {"timestep": call["timestep"] - step} for step in range(3))
    planned, plan = [], Adaptive.plan
    monkeypatch.setattr(Adaptive, "plan", lambda *args: planned.append(threading.get_ident()) or plan(*args))
    model.enable_sparse_attention(SPARSE)
    run(model, first)
    run(model, second)
    other = threading.Thread(target=run, args=(model, third))
    other.start()
    other.join()
    assert planned == [threading.get_ident()] * len(tiny.layers) + [other.ident] * len(tiny.layers)


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
            layer = pipeline.transformer.blocks[1].attn1.to_q
            owner, name = {"in a layer": (layer, "forward"), "in the strategy": (Adaptive, "plan")}[place]
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

    class Kept(Adaptive):
        def plan(self, *args, **kwargs):
            plans.add(plan := super().plan(*args, **kwargs))
            return plan

    return config(Kept(query_block_size=16, key_block_size=16)), plans


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


def test_a_second_expert_plans_anew_where_the_generation_before_was_interrupted_shortly_before():
    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 3
        return kwargs

    pipeline = tiny_wan_pipeline(two_experts=True)
    pipeline.enable_sparse_attention(config(strategy := Watched()))
    generate(pipeline, steps=6, callback_on_step_end=stop)
    assert strategy.planned == [(layer, step) for step in (0, 3) for layer in range(2)]
    strategy.calls.clear()
    # The second expert begins at step 5 of 12, two behind the plans that it has left from the first generation.
    generate(pipeline, steps=12, prompt="two dogs")
    assert strategy.planned == [(layer, step) for step in (0, 4, 5, 9) for layer in range(2)]


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


def test_plans_of_a_bare_transformer_go_with_a_video_of_another_size(watched):
    chosen, plans = watched
    model = TINY["wan"].make()
    model.enable_sparse_attention(chosen)
    kept = []
    for grid in [(3, 7, 5), (3, 5, 5), (2, 5, 5)]:
        run(model, TINY["wan"].call(model, grid))
        gc.collect()
        kept.append(len(plans))
    assert kept == [len(TINY["wan"].layers)] * 3


def test_an_enabled_transformer_runs_on_the_meta_device():
    # Where operations are counted: its timestep has no value.
    model = TINY["wan"].make()
    call = {name: x.to("meta") for name, x in TINY["wan"].call(model, (3, 7, 5)).items()}
    model.enable_sparse_attention(SPARSE)
    assert run(model.to("meta"), call).shape == call["hidden_states"].shape
    assert report_of(model).sparse_calls == 0


@pytest.mark.parametrize("name", ["wan", "qwen_image"])
def test_an_enabled_transformer_can_be_exported_and_goes_on(name):
    # Its timestep is a symbol there, which the steps of later calls cannot be compared with, and its mask of text has
    # no values.
    tiny = TINY[name]
    model = tiny.make()
    call = tiny.call(model, tiny.grid) | {"return_dict": False}
    if name == "qwen_image":
        call["encoder_hidden_states_mask"] = torch.ones(call["encoder_hidden_states"].shape[:2], dtype=torch.long)
    with torch.no_grad():
        expected = model(**call)[0]
        model.enable_sparse_attention(FULL)
        exported = torch.export.export(model, (), call).module()
        for each in (exported, model):
            torch.testing.assert_close(each(**call)[0], expected)
    assert report_of(model).sparse_calls == 2 * len(tiny.layers)


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

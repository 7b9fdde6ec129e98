from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_wan_pipeline

from diffsparse import Adaptive, Dense, SparseAttentionConfig
from diffsparse.eval import inspect_measures, inspect_watch
from diffsparse.eval.generate import Sampling, generate, load_pipeline
from diffsparse.eval.inspect_measures import HeadMeasure
from diffsparse.eval.inspect_watch import Head, Watch, stand_outs, watching

PROMPT = "a red striped circle moves right over a blue checkered background"
SMALL = {"density": 0.3, "query_block_size": 8, "key_block_size": 8, "sampled_rows": 8}


def config(strategy=None, **changes):
    chosen = {"strategy": strategy or Adaptive(**SMALL), "dense_steps": 0.4, "min_tokens": 0, "replan_every": 4}
    return SparseAttentionConfig(**(chosen | changes))


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return load_pipeline(tiny_model, "cpu")


def watch_run(pipe, tiny_model, chosen, map_steps=(1, 2), map_heads=None):
    watch = Watch(map_steps, map_heads)
    with watching(pipe, chosen, watch) as end_step:
        made = generate(pipe, PROMPT, 0, Sampling.read(tiny_model), end_step)
    return watch, torch.from_numpy(made.frames)


@pytest.mark.parametrize("changes", [{}, {"quantization": "int8"}], ids=["native", "int8"])
def test_watching_changes_no_bit_of_what_is_made(pipe, tiny_model, changes):
    pipe.enable_sparse_attention(config(**changes))
    expected = torch.from_numpy(generate(pipe, PROMPT, 0, Sampling.read(tiny_model)).frames)
    report = pipe.sparse_attention_report()
    pipe.disable_sparse_attention()
    watch, frames = watch_run(pipe, tiny_model, config(**changes))
    assert torch.equal(frames, expected)
    assert watch.report == report
    assert not pipe.is_sparse_attention_enabled


def test_every_head_of_every_sparse_step_is_measured_and_every_other_has_its_reason(pipe, tiny_model):
    watch, _ = watch_run(pipe, tiny_model, config(dense_layers=(1,)))
    assert set(watch.measures) == {("transformer", step, 0) for step in (1, 2)}
    assert all(len(heads) == 2 for heads in watch.measures.values())
    assert watch.dense_reasons == {
        ("transformer", 0, 0): "early step",
        **{("transformer", step, 1): "dense layer" for step in (0, 1, 2)},
    }
    # The plan is kept at the second step, and fits its queries less.
    assert watch.measures["transformer", 1, 0] != watch.measures["transformer", 2, 0]


def test_the_first_guidance_branch_is_measured(pipe, tiny_model, monkeypatch):
    """At the first step it sees what the only branch sees where there is no guidance."""
    measured = []
    real = inspect_watch.measure
    monkeypatch.setattr(inspect_watch, "measure", lambda call: measured.append(call.query) or real(call))
    watch_run(pipe, tiny_model, config(dense_steps=0.0))
    assert len(measured) == 2 * 3  # layers, steps
    guided = measured.copy()
    measured.clear()
    without_guidance = replace(Sampling.read(tiny_model), guidance_scale=1.0)
    with watching(pipe, config(dense_steps=0.0), Watch((), None)) as end_step:
        generate(pipe, PROMPT, 0, without_guidance, end_step)
    # The second layer, behind the text.
    assert torch.equal(measured[1], guided[1])


def test_experts_are_told_apart():
    experts = tiny_wan_pipeline(two_experts=True)
    watch = Watch((1, 2), None)
    with watching(experts, config(dense_steps=0.0), watch) as end_step:
        generate(experts, PROMPT, 0, Sampling(64, 64, 9, 3, 1.0, 24), end_step)
    at = {
        name: {place.step for place in watch.measures if place.transformer == name}
        for name in ("transformer", "transformer_2")
    }
    assert at["transformer"]
    assert at["transformer_2"]
    assert sorted([*at["transformer"], *at["transformer_2"]]) == [0, 1, 2]
    assert all(step in at[head.transformer] for head, step in watch.maps)


def test_a_strategy_that_keeps_all_dense_is_seen_as_such(pipe, tiny_model):
    watch, _ = watch_run(pipe, tiny_model, config(Dense()))
    assert (watch.measures, watch.maps) == ({}, {})
    of_sparse_steps = {reason for place, reason in watch.dense_reasons.items() if place.step > 0}
    assert of_sparse_steps == {"the strategy keeps it dense"}


def test_maps_are_of_the_heads_that_stand_out_at_the_first_of_their_steps(pipe, tiny_model):
    watch, _ = watch_run(pipe, tiny_model, config())
    at_first = {
        Head("transformer", place.layer, number): head
        for place, heads in watch.measures.items()
        if place.step == 1
        for number, head in enumerate(heads)
    }
    expected = set(stand_outs(at_first))
    assert {(head, step) for head, step in watch.maps} == {(head, step) for head in expected for step in (1, 2)}
    named, _ = watch_run(pipe, tiny_model, config(), (2,), ((1, 0),))
    assert set(named.maps) == {(Head("transformer", 1, 0), 2)}


def test_the_heads_that_stand_out_are_known_layer_by_layer():
    """Who stands out in the end did so when its own layer came, so that its map can be made then."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        errors = torch.randint(0, 6, (12,), generator=generator) / 10
        classes = torch.randint(0, 3, (12,), generator=generator).tolist()
        measures, seen = {}, set()
        for number, (error, kind) in enumerate(zip(errors.tolist(), classes)):
            head = Head("transformer", number, 0)
            measures[head] = HeadMeasure(f"class {kind}", 0.25, 0.5, error, False, False, 8.0, 7.0)
            seen |= {head for head in stand_outs(measures) if head.layer == number}
        found = stand_outs(measures)
        assert set(found) <= seen
        assert measures[next(iter(found))].error == errors.max()
        for kind in set(classes):
            of_class = [error for error, other in zip(errors.tolist(), classes) if other == kind]
            shown = [measures[head].error for head in found if measures[head].head_class == f"class {kind}"]
            assert {min(of_class), max(of_class)} <= set(shown)
            assert len(shown) <= 2


@pytest.mark.parametrize("what", ["query", "value"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_attention_that_is_no_number_is_an_error_that_names_the_head(pipe, tiny_model, monkeypatch, wrong, what):
    monkeypatch.setattr(inspect_measures, "SAMPLED_ROWS", 1)  # which the broken query is not
    real = inspect_watch.measure

    def broken(call):
        getattr(call, what)[0, 1, 5] = wrong
        return real(call)

    monkeypatch.setattr(inspect_watch, "measure", broken)
    with pytest.raises(ValueError, match="transformer, layer 0, head 1, at step 1 holds infinity or what is not"):
        watch_run(pipe, tiny_model, config())
    assert not pipe.is_sparse_attention_enabled


def test_a_head_that_no_layer_has_is_an_error_that_leaves_the_pipeline_as_it_was(pipe, tiny_model):
    with pytest.raises(ValueError, match="--heads 1:9: layer 1 of transformer has heads 0 to 1"):
        watch_run(pipe, tiny_model, config(), map_heads=((1, 9),))
    assert not pipe.is_sparse_attention_enabled

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from diffsparse.steps import CacheContextReceiver, Step, StepClock


class Pipeline:
    """Anything that owns a scheduler or a guider."""

    def __init__(self, **parts):
        self.__dict__.update(parts)


def test_the_first_fraction_of_the_steps():
    early = [Step(i, 50, 0, False).is_within_first(0.2) for i in range(50)]
    assert early == [True] * 10 + [False] * 40


def test_without_a_total_only_step_0_is_early():
    assert [Step(i, None, 0, False).is_within_first(0.2) for i in range(3)] == [True, False, False]
    assert not Step(0, None, 0, False).is_within_first(0.0)


def test_no_step_is_early_where_none_is_asked_for():
    assert not Step(0, 4, 0, False).is_within_first(0.0)
    assert all(Step(i, 4, 0, False).is_within_first(1.0) for i in range(4))


def test_the_cache_context_says_step_total_and_branch():
    clock, seen = StepClock(), []
    for index in range(2):
        for name in ("cond", "uncond"):
            with clock.receive(name, index, 2):
                seen.append(clock.tick(None))
    assert [(s.index, s.total, s.branch) for s in seen] == [
        (0, 2, "cond"), (0, 2, "uncond"), (1, 2, "cond"), (1, 2, "uncond"),
    ]  # fmt: skip
    assert [s.is_first_of_generation for s in seen] == [True, False, False, False]


def test_a_second_generation_starts_anew_even_with_one_step():
    clock = StepClock()
    firsts = []
    for _ in range(2):
        for name in ("cond", "uncond"):
            with clock.receive(name, 0, 1):
                firsts.append(clock.tick(None).is_first_of_generation)
    assert firsts == [True, False, True, False]


def test_the_scheduler_says_the_step():
    pipeline = Pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(4)
    clock, sample = StepClock(pipeline), torch.zeros(1, 2)
    for index, timestep in enumerate(scheduler.timesteps):
        for branch in range(2):
            step = clock.tick(timestep)
            assert (step.index, step.total, step.branch) == (index, 4, branch)
        sample = scheduler.step(sample, timestep, sample).prev_sample


def test_the_scheduler_is_read_anew_when_the_user_replaces_it():
    pipeline = Pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
    clock = StepClock(pipeline)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline.scheduler.set_timesteps(7)
    assert clock.tick(None).total == 7


def test_the_guider_says_step_and_branch():
    guider = SimpleNamespace(_step=3, _num_inference_steps=8, _count_prepared=2)
    pipeline = Pipeline(guider=guider)
    step = StepClock(pipeline).tick(None)
    assert (step.index, step.total, step.branch) == (3, 8, 2)


@pytest.mark.parametrize("falling", [True, False])
def test_a_changed_timestep_is_a_new_step_and_a_jump_back_a_new_generation(falling):
    values = [900.0, 500.0, 100.0] if falling else [0.1, 0.5, 0.9]
    clock, seen = StepClock(), []
    for _ in range(2):
        for value in values:
            for _ in range(2):  # a new tensor each time, as pipelines that expand it make
                seen.append(clock.tick(torch.tensor([value])))
    assert [s.index for s in seen] == [0, 0, 1, 1, 2, 2] * 2
    assert [s.branch for s in seen] == [0, 1] * 6
    assert [i for i, s in enumerate(seen) if s.is_first_of_generation] == [0, 6]


def tiny_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        ffn_dim=8,
        num_layers=1,
    )


def test_the_receiver_passes_the_context_on_to_the_hooks_of_the_transformer():
    transformer, clock = tiny_transformer(), StepClock()
    transformer.cache_context = CacheContextReceiver(transformer, clock)
    with transformer.cache_context("cond", step_index=2, num_inference_steps=5):
        step = clock.tick(None)
    assert (step.index, step.total, step.branch) == (2, 5, "cond")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_transformer_does_not_tell_the_clock(copied):
    transformer, clock = tiny_transformer(), StepClock()
    transformer.cache_context = CacheContextReceiver(transformer, clock)
    twin = copied(transformer)
    with twin.cache_context("cond", step_index=2, num_inference_steps=5):
        assert clock.tick(None).index == 0
    assert twin.cache_context.__self__ is twin


def test_calls_that_nothing_tells_apart_do_not_pile_up():
    clock = StepClock()
    seen = [clock.tick(torch.tensor([500.0])) for _ in range(9)]
    assert len({step.branch for step in seen}) <= 4
    assert [i for i, step in enumerate(seen) if step.is_first_of_generation] == [0, 4, 8]

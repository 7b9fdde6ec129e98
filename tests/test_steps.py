from __future__ import annotations

import copy
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosDMDScheduler,
    HeunDiscreteScheduler,
    LTXEulerAncestralRFScheduler,
    UniPCMultistepScheduler,
)
from tiny_models import TINY

from diffsparse.steps import CacheContextReceiver, Step, StepClock


class Pipeline:
    """Anything that owns a scheduler or a guider."""

    def __init__(self, **parts):
        self.__dict__.update(parts)


def denoising(scheduler, first=0, end=None):
    """The timesteps of a scheduler, which takes its step after each."""
    sample = torch.zeros(1, 2)
    for timestep in scheduler.timesteps[first:end]:
        yield timestep
        sample = scheduler.step(sample, timestep, sample).prev_sample


def ticks(clock, timesteps, calls_per_step=1):
    return [clock.tick(torch.as_tensor(value).reshape(1)) for value in timesteps for _ in range(calls_per_step)]


def places(seen):
    return [(step.index, step.total) for step in seen]


def firsts(seen):
    """Which of them are the first of a generation."""
    return [i for i, step in enumerate(seen) if step.is_first_of_generation]


def test_the_first_fraction_of_the_steps():
    early = [Step(i, 50, 0, False).is_within_first(0.2) for i in range(50)]
    assert early == [True] * 10 + [False] * 40


def test_without_a_total_only_step_0_is_early():
    assert [Step(i, None, 0, False).is_within_first(0.2) for i in range(3)] == [True, False, False]
    assert not Step(0, None, 0, False).is_within_first(0.0)


def test_no_step_is_early_where_none_is_asked_for():
    assert not Step(0, 4, 0, False).is_within_first(0.0)
    assert all(Step(i, 4, 0, False).is_within_first(1.0) for i in range(4))


@pytest.mark.parametrize(("total", "every"), [(50, 4), (10, 4), (7, 3), (4, 4), (1, 4)])
def test_the_sparse_steps_that_plans_serve_have_come_half_way_on_average(total, every):
    first = round(0.2 * total)
    plans = range(first, total, every)
    served = [min(every, total - index) for index in plans]
    progress = [Step(index, total, 0, False).progress_beyond(0.2, every) for index in plans]
    assert sorted(progress) == progress
    assert 0 < progress[0] <= progress[-1] < 1
    assert sum(n * p for n, p in zip(served, progress)) == pytest.approx(0.5 * (total - first))


@pytest.mark.parametrize("every", [1, 3, 4])
def test_progress_is_that_of_the_steps_that_run_sparse(every):
    # Of 20 steps the first 4 are dense, but the generation begins with the sixth, and the last three are not sparse.
    steps = [Step(i, 20, 0, False, sparse_from=5, sparse_until=17) for i in range(5, 17, every)]
    progress = [step.progress_beyond(0.2, every) for step in steps]
    assert progress == pytest.approx([(i + every / 2) / 12 for i in range(0, 12, every)])
    # Where the config's dense steps reach further, they count.
    assert Step(8, 20, 0, False, sparse_from=5).progress_beyond(0.4, 12) == 0.5


@pytest.mark.parametrize("step", [Step(5, 5, 0, False), Step(9, 5, 0, False), Step(1, 5, 0, False, sparse_from=3)])
@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_progress_is_a_share_even_of_a_step_that_nobody_expected(step, fraction):
    assert 0 < step.progress_beyond(fraction, 4) < 1


def test_a_second_expert_goes_on_where_the_first_has_come_to():
    scheduler = SimpleNamespace(timesteps=torch.tensor([900.0, 700.0, 400.0, 100.0]), _step_index=2, _begin_index=None)
    pipeline = Pipeline(scheduler=scheduler)
    step = StepClock(pipeline).tick(torch.tensor(400.0))
    assert (step.index, step.sparse_from) == (2, 0)


def test_nobody_knows_the_progress_of_steps_without_a_total():
    assert Step(3, None, 0, False).progress_beyond(0.2, 4) is None


def test_the_cache_context_says_step_total_and_branch():
    clock, seen = StepClock(), []
    for index in range(2):
        for name in ("cond", "uncond"):
            with clock.receive(name, index, 2):
                seen.append(clock.tick(None))
    assert [(s.index, s.total, s.branch) for s in seen] == [
        (0, 2, "cond"), (0, 2, "uncond"), (1, 2, "cond"), (1, 2, "uncond"),
    ]  # fmt: skip
    assert firsts(seen) == [0]


def test_a_second_generation_starts_anew_even_with_one_step():
    clock, seen = StepClock(), []
    for name in 2 * ("cond", "uncond"):
        with clock.receive(name, 0, 1):
            seen.append(clock.tick(None))
    assert firsts(seen) == [0, 2]


def test_the_scheduler_says_the_step():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    pipeline = Pipeline(scheduler=scheduler)
    clock = StepClock(pipeline)
    for index, timestep in enumerate(denoising(scheduler)):
        for branch in range(2):
            step = clock.tick(timestep)
            assert (step.index, step.total, step.branch) == (index, 4, branch)


def test_the_scheduler_is_read_anew_when_the_user_replaces_it():
    pipeline = Pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
    clock = StepClock(pipeline)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline.scheduler.set_timesteps(7)
    assert clock.tick(None).total == 7


@pytest.mark.parametrize("part", ["scheduler", "guider"])
def test_the_parts_of_a_pipeline_that_is_gone_still_say_the_step(part):
    # `pipe = FluxImg2ImgPipeline.from_pipe(pipe)`: another pipeline goes on with the same parts.
    if part == "scheduler":
        kept = FlowMatchEulerDiscreteScheduler()
        pipeline = Pipeline(scheduler=kept)
    else:
        kept = SimpleNamespace(_step=0, _num_inference_steps=None)
        pipeline = Pipeline(guider=kept)
    clock = StepClock(pipeline)
    gone = weakref.ref(pipeline)
    del pipeline
    assert gone() is None
    if part == "scheduler":
        kept.set_timesteps(5)
        kept._step_index = 2
    else:
        kept._step, kept._num_inference_steps = 2, 5
    step = clock.tick(None)
    assert (step.index, step.total) == (2, 5)


def test_the_guider_says_step_and_branch():
    guider = SimpleNamespace(_step=3, _num_inference_steps=8, _count_prepared=2)
    pipeline = Pipeline(guider=guider)
    step = StepClock(pipeline).tick(None)
    assert (step.index, step.total, step.branch) == (3, 8, 2)


def test_the_second_transformer_goes_by_its_own_guider():
    # As in modular Wan 2.2, whose first guider has stopped by then. There may also be one for both.
    first = SimpleNamespace(_step=2, _num_inference_steps=8, _count_prepared=2)
    second = SimpleNamespace(_step=3, _num_inference_steps=8, _count_prepared=1)
    for guider_2, expected in ((second, (3, 8, 1)), (None, (2, 8, 2))):
        pipeline = Pipeline(guider=first, guider_2=guider_2)
        step = StepClock(pipeline, "transformer_2").tick(None)
        assert (step.index, step.total, step.branch) == expected
        step = StepClock(pipeline, "transformer").tick(None)
        assert (step.index, step.total, step.branch) == (2, 8, 2)


def test_the_scheduler_says_the_step_and_the_guider_the_branch():
    # The guider counts anew where the generation begins late, and takes Heun's 9 evaluations for 5 steps.
    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(3)
    guider = SimpleNamespace(_step=0, _num_inference_steps=5, _count_prepared=2)
    pipeline = Pipeline(scheduler=scheduler, guider=guider)
    clock = StepClock(pipeline)
    for index, timestep in enumerate(denoising(scheduler, 3)):
        guider._step = index
        step = clock.tick(timestep)
        assert (step.index, step.total, step.branch, step.sparse_from) == (3 + index, 9, 2, 3)
    # A loop that the scheduler has no part in.
    guider._step = 2
    step = clock.tick(torch.tensor(3.0))
    assert (step.index, step.total) == (2, 5)


def test_a_guider_that_stands_still_runs_no_loop():
    # As a generation has left it: the user goes on with a loop of their own, and another scheduler.
    guider = SimpleNamespace(_step=9, _num_inference_steps=10, _count_prepared=2)
    pipeline = Pipeline(guider=guider)
    clock = StepClock(pipeline)
    for generation in range(2):
        seen = ticks(clock, range(1000, 0, -50), calls_per_step=2)
        # The first timestep does not tell.
        believed = 2 if generation == 0 else 0
        assert places(seen[believed:]) == [(i, None) for i in range(20) for _ in range(2)][believed:]
        assert firsts(seen)[-1] <= believed
    guider._step = 0
    step = clock.tick(torch.tensor(1000.0))
    assert (step.index, step.total, step.branch) == (0, 10, 2)


@pytest.mark.parametrize("falling", [True, False])
def test_a_changed_timestep_is_a_new_step_and_a_jump_back_a_new_generation(falling):
    values = [900.0, 500.0, 100.0] if falling else [0.1, 0.5, 0.9]
    # A new tensor each time, as pipelines that expand it make.
    seen = ticks(StepClock(), 2 * values, calls_per_step=2)
    assert [s.index for s in seen] == [0, 0, 1, 1, 2, 2] * 2
    assert [s.branch for s in seen] == [0, 1] * 6
    assert firsts(seen) == [0, 6]


def test_the_receiver_passes_the_context_on_to_the_hooks_of_the_transformer():
    transformer, clock = TINY["wan"].make(), StepClock()
    transformer.cache_context = CacheContextReceiver(transformer, clock)
    with transformer.cache_context("cond", step_index=2, num_inference_steps=5):
        step = clock.tick(None)
    assert (step.index, step.total, step.branch) == (2, 5, "cond")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_transformer_does_not_tell_the_clock(copied):
    transformer, clock = TINY["wan"].make(), StepClock()
    transformer.cache_context = CacheContextReceiver(transformer, clock)
    twin = copied(transformer)
    with twin.cache_context("cond", step_index=2, num_inference_steps=5):
        assert clock.tick(None).index == 0
    assert twin.cache_context.__self__ is twin


def test_calls_that_nothing_tells_apart_do_not_pile_up():
    seen = ticks(StepClock(), 9 * [500.0])
    assert len({step.branch for step in seen}) <= 4
    assert firsts(seen) == [0, 4, 8]


@pytest.mark.parametrize("left", ["new", "used up", "in the middle"])
def test_a_loop_of_the_users_own_goes_by_its_timesteps_whatever_the_pipelines_scheduler_says(left):
    scheduler = FlowMatchEulerDiscreteScheduler()
    if left != "new":
        scheduler.set_timesteps(6)
        list(denoising(scheduler, end=6 if left == "used up" else 3))
    pipeline = Pipeline(scheduler=scheduler)
    clock = StepClock(pipeline)
    for generation in range(2):
        seen = ticks(clock, range(1000, 0, -50))
        # A scheduler that has begun and not ended is believed for as many calls as a step may have.
        believed = 4 if generation == 0 and left == "in the middle" else 0
        assert places(seen[believed:]) == [(i, None) for i in range(20 - believed)]
        assert firsts(seen) == ([0, 4] if believed else [0])


def test_copies_of_the_scheduler_may_run_the_loop():
    # As SkyReels-V2 has one for each frame in its pipelines of diffusion forcing.
    scheduler = UniPCMultistepScheduler()
    pipeline = Pipeline(scheduler=scheduler)
    clock = StepClock(pipeline)
    for count in (10, 10, 7):
        scheduler.set_timesteps(count)
        seen = ticks(clock, scheduler.timesteps.tolist(), calls_per_step=2)
        # The scheduler is believed for as many calls as a step may have.
        expected = [0] * 4 + [i for i in range(2, count) for _ in range(2)]
        assert places(seen) == [(i, count) for i in expected]
        assert firsts(seen) == [0]


@pytest.mark.parametrize("guided", [False, True])
def test_a_scheduler_that_counts_no_steps_says_the_step_by_its_timesteps(guided):
    # As the distilled Helios has it, whose pipeline hands over timesteps without their fractions.
    scheduler = HeliosDMDScheduler(stages=2, stage_range=[0, 0.5, 1])
    # Its modular pipeline tells the guider of half the steps that the first chunk has.
    guider = SimpleNamespace(_step=0, _num_inference_steps=2) if guided else None
    pipeline = Pipeline(scheduler=scheduler, guider=guider)
    clock = StepClock(pipeline)
    for stage in (0, 1, 0, 1):
        scheduler.set_timesteps(3, stage)
        assert scheduler.timesteps[1] != scheduler.timesteps[1].long()
        seen = []
        for index, timestep in enumerate(scheduler.timesteps):
            if guided:
                guider._step = index
            with clock.receive("cond", None, None):
                seen.append(clock.tick(timestep.expand(1).to(torch.int64)))
        assert scheduler._step_index is None
        assert places(seen) == [(0, 3), (1, 3), (2, 3)]
        assert firsts(seen) == [0]
        assert [step.is_last_of_generation for step in seen] == [False, False, True]


def test_many_branches_of_one_step_do_not_make_the_scheduler_look_idle():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    pipeline = Pipeline(scheduler=scheduler)
    clock = StepClock(pipeline)
    for index, timestep in enumerate(denoising(scheduler)):
        seen = [clock.tick(timestep.expand(2)) for _ in range(7)]
        assert set(places(seen)) == {(index, 3)}


@pytest.mark.parametrize("tiles", [5, 9, 16])
def test_tiles_of_a_step_of_the_scheduler_are_told_apart(tiles):
    # As the epilogue of LTX-2 has them, one call for each.
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    pipeline = Pipeline(scheduler=scheduler)
    clock = StepClock(pipeline)
    seen = ticks(clock, denoising(scheduler), calls_per_step=tiles)
    assert [step.branch for step in seen] == 3 * list(range(tiles))
    assert firsts(seen) == [0]
    assert [step.is_last_of_generation for step in seen] == [False] * (3 * tiles - 1) + [True]


def test_a_generation_after_a_loop_of_the_users_own_goes_by_the_scheduler_again():
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = Pipeline(scheduler=scheduler)
    clock = StepClock(pipeline)
    ticks(clock, range(1000, 0, -50))
    scheduler.set_timesteps(5)
    step = clock.tick(scheduler.timesteps[0])
    assert (step.index, step.total, step.is_first_of_generation) == (0, 5, True)


def test_a_scheduler_without_a_step_index_says_the_step_by_its_timesteps():
    # As CogVideoX has it.
    scheduler = CogVideoXDDIMScheduler()
    assert not hasattr(scheduler, "_step_index")
    pipeline = Pipeline(scheduler=scheduler)
    clock = StepClock(pipeline)
    for count in (10, 4):
        scheduler.set_timesteps(count)
        seen = ticks(clock, scheduler.timesteps.tolist(), calls_per_step=2)
        assert places(seen) == [(i, count) for i in range(count) for _ in range(2)]
    # From the middle of the schedule, as video to video begins.
    seen = ticks(clock, scheduler.timesteps[2:].tolist())
    assert places(seen) == [(2, 4), (3, 4)]
    assert seen[0].is_first_of_generation
    # Timesteps that are not its own.
    assert places(ticks(clock, [990.5, 500.5, 100.5])) == [(0, None), (1, None), (2, None)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_a_timestep_is_found_in_the_schedule_whatever_dtype_the_pipeline_gives_it(dtype):
    # HunyuanDiT's pipeline hands it over in the model's; bfloat16 has no 981.
    scheduler = DDPMScheduler(steps_offset=1)
    scheduler.set_timesteps(50)
    pipeline = Pipeline(scheduler=scheduler)
    for begin in (0, 30):
        timesteps = [timestep.to(dtype) for timestep in scheduler.timesteps[begin:]]
        seen = ticks(StepClock(pipeline), timesteps, calls_per_step=2)
        assert places(seen) == [(i, 50) for i in range(begin, 50) for _ in range(2)]
        assert {step.sparse_from for step in seen} == {begin}


def test_a_scheduler_that_is_not_told_where_the_loop_begins_is_asked_for_the_first_timestep():
    # As video to video of Wan runs it.
    scheduler = UniPCMultistepScheduler()
    pipeline = Pipeline(scheduler=scheduler)
    clock = StepClock(pipeline)
    for _ in range(2):
        scheduler.set_timesteps(10)
        seen = ticks(clock, denoising(scheduler, 6), calls_per_step=2)
        assert places(seen) == [(i, 10) for i in range(6, 10) for _ in range(2)]
        assert firsts(seen) == [0]


def test_a_timestep_that_is_a_share_is_not_taken_for_the_last_one():
    # As PRX's pipeline has it: the schedule ends at 1, and its first timestep is handed over as 1.
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    assert scheduler.timesteps[-1] == 1
    pipeline = Pipeline(scheduler=scheduler)
    clock = StepClock(pipeline)
    seen = [clock.tick(timestep / 1000) for timestep in denoising(scheduler)]
    assert [(step.index, step.sparse_from) for step in seen] == [(index, 0) for index in range(5)]


def test_new_timesteps_are_a_new_generation_wherever_it_begins():
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = Pipeline(scheduler=scheduler)
    clock = StepClock(pipeline)
    for begin in (2, 3):
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(begin)
        # Two steps of ten, and then an interrupt.
        assert firsts(ticks(clock, denoising(scheduler, begin, begin + 2), calls_per_step=2)) == [0]


def test_branches_are_counted_anew_where_one_of_them_was_interrupted():
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = Pipeline(scheduler=scheduler)
    clock, seen = StepClock(pipeline), []
    for calls in (1, 2):
        scheduler.set_timesteps(10)
        seen += [clock.tick(scheduler.timesteps[0].item()) for _ in range(calls)]
    assert [(step.branch, step.is_first_of_generation) for step in seen] == [(0, True), (0, True), (1, False)]


def test_timesteps_that_a_scheduler_makes_at_each_look_are_no_new_generation():
    class Scheduler:
        _step_index, _begin_index = 0, None

        @property
        def timesteps(self):
            return torch.tensor([900.0, 600.0, 300.0])

    pipeline = Pipeline(scheduler=Scheduler())
    clock, seen = StepClock(pipeline), []
    for index in range(3):
        pipeline.scheduler._step_index = index
        seen.append(clock.tick(None))
    assert firsts(seen) == [0]


@pytest.mark.parametrize("make", [FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("begin", [0, 2])
def test_the_last_call_of_the_last_step_is_known(make, begin):
    scheduler = make()
    scheduler.set_timesteps(4)
    total = len(scheduler.timesteps)
    scheduler.set_begin_index(begin)
    pipeline = Pipeline(scheduler=scheduler)
    seen = ticks(StepClock(pipeline), denoising(scheduler, begin), calls_per_step=2)
    assert [step.is_last_of_generation for step in seen] == [False] * (2 * (total - begin) - 1) + [True]


def test_a_timestep_at_the_end_that_is_not_run_is_no_step():
    # As the pipeline of LTX-2 that refines in time has it.
    scheduler = LTXEulerAncestralRFScheduler()
    scheduler.set_timesteps(sigmas=[0.9, 0.7, 0.4, 0.0])
    pipeline = Pipeline(scheduler=scheduler)
    seen = ticks(StepClock(pipeline), denoising(scheduler, end=-1))
    assert places(seen) == [(0, 3), (1, 3), (2, 3)]
    assert [step.is_last_of_generation for step in seen] == [False, False, True]


def test_no_call_is_the_last_where_the_steps_before_do_not_say_how_many_there_are():
    clock = StepClock()
    for _ in range(2):
        with clock.receive("cond", 0, 1):
            assert not clock.tick(None).is_last_of_generation
    assert not any(step.is_last_of_generation for step in ticks(clock, [900, 500, 100]))

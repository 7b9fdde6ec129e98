from __future__ import annotations

import dataclasses
import gc
import weakref

import comfy_standins as standins
import pytest
import torch

import diffsparse.config
from diffsparse.comfy.calibrate_node import DiffSparseCalibrate
from diffsparse.plan import AttentionPlan
from diffsparse.plan_file import load_plans, save_plans
from diffsparse.plan_recorder import PlanRecorder
from diffsparse.session import DenseFallback
from diffsparse.speed_check import SpeedCheck


@pytest.fixture
def file(tmp_path):
    """Where the node writes `plan`."""
    return tmp_path / "models" / "diffsparse" / "plan.safetensors"


def recording(model, replan_every=4, **settings):
    (model,) = DiffSparseCalibrate().record(standins.patched(model, **settings), "plan", replan_every)
    return model


@pytest.mark.parametrize("model_class", [standins.WanModel, standins.HunyuanVideo])
@pytest.mark.parametrize("quantize", ["off", "int8"])
def test_the_file_makes_the_very_latents_that_it_was_made_with(file, model_class, quantize, caplog):
    model = standins.patcher(model_class)
    options = {"density": 0.6, "quantize": quantize}

    def sample(model):
        # One by one, the branches of guidance share their plans.
        return standins.sample(model, split=True)

    expected = sample(standins.patched(model, **options))
    assert torch.equal(sample(recording(model, **options)), expected)
    # What the preset says has no effect.
    served = standins.patched(model, plan_file="plan.safetensors", preset="fast", quantize=quantize, strict=True)
    assert torch.equal(sample(served), expected)
    assert "preset fast and density 0.25 have no effect with plan_file plan.safetensors" in caplog.text
    assert not torch.equal(sample(standins.patched(model, preset="fast", quantize=quantize)), expected)


def test_blocks_that_stay_dense_are_left_to_comfyui_whatever_the_file_says(file):
    model = standins.patcher(layers=2)
    standins.sample(recording(model, dense_blocks="0", min_tokens=0))
    made = load_plans(file)
    save_plans(file, dataclasses.replace(made, settings=made.settings | {"dense_quantization": "int8"}))
    served = standins.patched(model, plan_file="plan.safetensors", dense_blocks="0", min_tokens=0)
    standins.sample(served)
    reasons = served.get_attachment("diffsparse").report().transformers[0].dense_reasons
    assert set(reasons) <= {"dense layer", "early step"}


def test_nothing_is_timed_while_a_file_is_made(file, monkeypatch):
    monkeypatch.setattr(SpeedCheck, "time", lambda *args: pytest.fail("timed"))
    monkeypatch.setattr(diffsparse.config, "MIN_TOKENS", 0)
    standins.sample(recording(standins.patcher(), min_tokens=-1))
    assert load_plans(file).num_prompts == 1


def test_prompts_in_one_batch_vote_and_the_density_stays(file):
    model = standins.patcher()
    strategy = standins.patched(model, density=0.3)
    expected, made = standins.sample(strategy), standins.sample(recording(model, density=0.3))
    assert torch.equal(made, expected)
    of_file = standins.patched(model, plan_file="plan.safetensors", strict=True)
    dense = standins.sample(model)
    assert (standins.sample(of_file) - expected).norm() < (expected - dense).norm()
    densities = [each.get_attachment("diffsparse").report().density for each in (strategy, of_file)]
    assert densities[0] == pytest.approx(densities[1], abs=0.01)


def test_the_file_says_what_it_was_made_for(file):
    standins.sample(recording(standins.patcher(layers=3), replan_every=2, dense_blocks="1", density=0.3))
    made = load_plans(file)
    assert (made.model, made.num_layers, made.num_heads) == ("WanModel", 3, 2)
    assert (made.num_prompts, made.num_steps, made.settings["replan_every"]) == (1, 5, 2)
    assert {entry.layer for entry in made.entries} == {0, 2}
    # Of 5 steps the first is early, and plans are made anew every second one.
    assert {entry.from_step for entry in made.entries} <= {1, 3}


def test_no_file_is_made_where_another_node_takes_a_few_heads_at_a_time(file):
    with pytest.raises(ValueError, match="another node takes 1 heads of a block at a time"):
        standins.sample(recording(standins.head_by_head(), start_percent=0.0))
    assert not file.exists()


@pytest.mark.parametrize("model_class", [standins.WanModel, standins.HunyuanVideo])
def test_no_file_is_made_where_calls_differ_in_length_and_that_is_said_at_the_first_step(file, model_class):
    model = recording(standins.patcher(model_class), start_percent=0.5)
    texts = {kind: torch.randn(1, 6 + kind, 32) for kind in (0, 1)}
    steps: list = []

    def sample():
        with torch.no_grad():
            return standins.Guider(model, split=True).sample(
                torch.randn(1, 4, 3, 14, 10), torch.linspace(1, 0, 5), texts, steps.append
            )

    if model_class is standins.WanModel:
        # Its text is in no sequence.
        sample()
        assert file.exists()
    else:
        with pytest.raises(ValueError, match=r"111 tokens.* after one of 112.*prompts of one length"):
            sample()
        assert steps == []
        assert not file.exists()


def test_a_file_of_a_compiled_mochi_is_for_mochi(file):
    model = standins.patcher(standins.AsymmDiTJoint, layers=1)
    model.diffusion_model = torch.compile(model.diffusion_model, backend="eager")
    standins.sample(recording(model))
    assert load_plans(file).model == "AsymmDiTJoint"
    served = standins.patched(model, plan_file="plan.safetensors", strict=True)
    standins.sample(served)
    assert served.get_attachment("diffsparse").report().transformers[0].sparse_calls == 4


def test_what_was_recorded_does_not_outlive_the_run(file, monkeypatch):
    recorders = weakref.WeakSet()
    init = PlanRecorder.__init__

    def watched(self, *args):
        init(self, *args)
        recorders.add(self)

    monkeypatch.setattr(PlanRecorder, "__init__", watched)
    seen = []
    model = recording(standins.patcher())
    standins.sample(model, on_step=lambda step: seen.append(len(recorders)))
    gc.collect()
    assert set(seen) == {1}
    assert file.exists()
    assert len(recorders) == 0
    assert model.get_attachment("diffsparse").report().transformers[0].sparse_calls == 8


class Interrupted(Exception):
    pass


def test_an_interrupt_leaves_the_file_that_was_there_or_none(file, caplog):
    def stop(step):
        if step == 2:
            raise Interrupted

    model = standins.patcher()
    dense = standins.sample(model)
    for was_there in (False, True):
        caplog.clear()
        before = file.read_bytes() if was_there else None
        with pytest.raises(Interrupted), caplog.at_level("INFO"):
            standins.sample(recording(model), on_step=stop)
        assert "plan.safetensors is not written, as the sampling did not reach its end" in caplog.text
        assert list(file.parent.iterdir()) == ([file] if was_there else [])
        assert not was_there or file.read_bytes() == before
        assert torch.equal(standins.sample(model), dense)
        standins.sample(recording(model))


def test_each_sampling_starts_anew(file):
    model = recording(standins.patcher())
    standins.sample(model)
    first = file.read_bytes()
    standins.sample(model, frames=3)
    assert load_plans(file).grid.frames == 3
    standins.sample(model)
    assert file.read_bytes() == first


@pytest.mark.parametrize("settings", [{"min_tokens": 5000}, {"start_percent": 1.0}])
def test_where_nothing_was_sparse_that_is_an_error_with_the_reason(file, settings):
    with pytest.raises(ValueError, match=r"nothing to write into plan.safetensors.*dense in 10: (fewer|early)"):
        standins.sample(recording(standins.patcher(), **settings))
    assert list(file.parent.iterdir()) == []


def test_what_memory_was_too_short_for_is_not_kept(file, monkeypatch, caplog):
    def attend(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(AttentionPlan, "attend", attend)
    with caplog.at_level("INFO"):
        standins.sample(recording(standins.patcher()))
    assert "plan.safetensors is not written, as memory ran out" in caplog.text
    assert list(file.parent.iterdir()) == []


def test_a_full_disk_leaves_no_file(file, monkeypatch):
    model = recording(standins.patcher())

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", no_space)
    with pytest.raises(OSError, match="No space left"):
        standins.sample(model)
    assert list(file.parent.iterdir()) == []


def test_it_needs_diffsparse_attention_before_it():
    with pytest.raises(ValueError, match="comes from no DiffSparse Attention"):
        DiffSparseCalibrate().record(standins.patcher())


def test_it_is_the_last_of_the_nodes(file):
    recorded = recording(standins.patcher())
    for later in (standins.patched, recording):
        with pytest.raises(ValueError, match=r"Let it be the last of them"):
            later(recorded) if later is standins.patched else DiffSparseCalibrate().record(recorded)


def test_plans_out_of_a_file_are_not_recorded_again(file):
    standins.sample(recording(standins.patcher()))
    with pytest.raises(ValueError, match=r"runs .*plan\.safetensors already"):
        recording(standins.patcher(), plan_file="plan.safetensors")


def test_a_bad_name_is_said_before_anything_runs():
    check = DiffSparseCalibrate.VALIDATE_INPUTS
    assert check(file_name="wan 720p") is True
    assert check() is True
    assert "is no name of a file" in check(file_name="../wan")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"layers": 3}, r"WanModel with 2 self-attention layers, but this is WanModel with 3"),
        ({"model_class": standins.HunyuanVideo}, r"but this is HunyuanVideo with 2"),
    ],
)
def test_a_file_of_another_model_is_refused_at_the_node(file, other, message):
    standins.sample(recording(standins.patcher()))
    with pytest.raises(ValueError, match=message):
        standins.patched(standins.patcher(**other), plan_file="plan.safetensors")


def test_a_file_of_another_size_or_head_count_is_refused_at_the_first_call(file):
    standins.sample(recording(standins.patcher()))
    steps = []
    # Also where the first steps are dense.
    model = standins.patcher()
    served = standins.patched(model, plan_file="plan.safetensors", start_percent=0.5)
    with pytest.raises(ValueError, match=r"frames=5.*but this call has.*frames=3"):
        standins.sample(served, frames=3, on_step=steps.append)
    with pytest.raises(ValueError, match="for 2 heads, but this model has 4"):
        standins.sample(standins.patched(standins.patcher(heads=4), plan_file="plan.safetensors"), on_step=steps.append)
    assert steps == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.diffusion_model.modules())
    standins.sample(served)


@pytest.mark.parametrize("keep", [0, 100, -10])
def test_a_damaged_file_is_refused_at_the_node(file, keep):
    standins.sample(recording(standins.patcher()))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"plan.safetensors cannot be (read|used)"):
        standins.patched(standins.patcher(), plan_file="plan.safetensors")


def test_a_strict_run_is_recorded_too(file):
    with pytest.raises(DenseFallback):
        standins.sample(recording(standins.patcher(mask=torch.zeros(400, 400)), strict=True))
    assert list(file.parent.iterdir()) == []

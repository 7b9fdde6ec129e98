from __future__ import annotations

import logging
import os

import comfy_standins as standins
import pytest
import torch

from diffsparse.comfy.attention_node import DiffSparseAttention
from diffsparse.session import DenseFallback

MODELS = (standins.WanModel, standins.HunyuanVideo)


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("model_class", MODELS)
def test_more_density_comes_closer_to_dense(model_class):
    model = standins.patcher(model_class)
    dense = standins.sample(model)
    little, more, all_of_it = (
        distance(standins.sample(standins.patched(model, density=density, strict=True)), dense)
        for density in (0.2, 0.6, 1.0)
    )
    assert little > more > 0
    # The same sums in another order: float32 rounds each of the five steps.
    assert all_of_it < 1e-5 < more


def test_eight_bits_cost_less_than_half_of_the_blocks_do():
    model = standins.patcher()
    native, quantized = (
        standins.sample(standins.patched(model, density=0.6, strict=True, quantize=quantize))
        for quantize in ("off", "int8")
    )
    assert 0 < distance(quantized, native) < distance(native, standins.sample(model))


@pytest.mark.parametrize("split", [False, True])
def test_the_same_seed_gives_the_same_latents(split):
    model = standins.patched(standins.patcher())
    assert torch.equal(standins.sample(model, split=split), standins.sample(model, split=split))


@pytest.mark.parametrize("model_class", MODELS)
def test_the_model_is_untouched_by_what_sampled_a_clone(model_class):
    model = standins.patcher(model_class)
    before = standins.sample(model)
    standins.sample(standins.patched(model))
    assert torch.equal(standins.sample(model), before)
    assert not model.wrappers
    assert not model.model_options["transformer_options"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.diffusion_model.modules())


def test_a_node_that_is_off_gives_out_the_model_itself():
    model = standins.patcher()
    assert DiffSparseAttention().patch(model, enabled=False) == (model,)


def test_short_sequences_stay_dense_by_default_and_the_line_says_so(caplog):
    model = standins.patcher()
    with caplog.at_level(logging.INFO):
        (sparse,) = DiffSparseAttention().patch(model)
        assert torch.equal(standins.sample(sparse), standins.sample(model))
    assert "0 of 5 steps sparse" in caplog.text
    assert "fewer than 4096 tokens" in caplog.text


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_that_is_no_transformer_passes_through_with_a_message(strict, caplog):
    model = standins.patcher(standins.UNetModel)
    if strict:
        with pytest.raises(ValueError, match=r"UNetModel is no diffusion transformer that this node knows \(wan, "):
            standins.patched(model, strict=True)
    else:
        assert standins.patched(model) is model
        assert "UNetModel is no diffusion transformer" in caplog.text


def test_blocks_that_the_model_does_not_have_are_named():
    with pytest.raises(ValueError, match="This model has 2 blocks, 0 to 1, and none numbered 7"):
        standins.patched(standins.patcher(), dense_blocks="0, 7")


def test_dense_blocks_stay_dense():
    model = standins.patched(standins.patcher(layers=3), start_percent=0.0, dense_blocks="0, -1")
    standins.sample(model)
    report = model.get_attachment("diffsparse").report().transformers[0]
    assert report.dense_reasons == {"dense layer": 10}
    assert [set(classes) == {"dense"} for classes in report.head_classes] == [True, False, True]


def test_a_second_node_takes_the_place_of_the_first(caplog):
    model = standins.patcher()
    with caplog.at_level(logging.INFO):
        twice = standins.patched(standins.patched(model, density=0.2), density=0.6)
        latents = standins.sample(twice)
    assert "takes the place of the first" in caplog.text
    assert caplog.text.count("steps sparse") == 1
    assert torch.equal(latents, standins.sample(standins.patched(model, density=0.6)))


def test_a_density_that_the_preset_does_not_use_is_said(caplog):
    DiffSparseAttention().patch(standins.patcher(), preset="fast", density=0.5)
    assert "density 0.5 has no effect with preset fast, which computes 0.15" in caplog.text


def test_what_makes_no_sense_is_said_before_anything_runs():
    check = DiffSparseAttention.VALIDATE_INPUTS
    assert check(dense_blocks="0-2, -1") is True
    assert check() is True
    assert "neither a block nor a range" in check(dense_blocks="first")


def test_a_window_that_ends_before_it_starts_is_refused():
    with pytest.raises(ValueError, match=r"start_percent 0\.5 is after end_percent 0\.2"):
        standins.patched(standins.patcher(), start_percent=0.5, end_percent=0.2)


def test_defaults_of_the_widgets_are_those_of_the_function():
    types = DiffSparseAttention.INPUT_TYPES()
    widgets = {
        name: options["default"]
        for name, (_, options) in (types["required"] | types["optional"]).items()
        if "default" in options
    }
    defaults = dict(zip(DiffSparseAttention.patch.__code__.co_varnames[2:], DiffSparseAttention.patch.__defaults__))
    assert widgets == {name: defaults[name] for name in widgets}


def test_strict_raises_where_attention_cannot_be_sparse_and_the_model_works_afterwards():
    model = standins.patcher(mask=torch.zeros(400, 400))
    dense = standins.sample(model)
    with pytest.raises(DenseFallback, match=r"layer 0 \(blocks\.0\) cannot run sparse: attention mask"):
        standins.sample(standins.patched(model, strict=True))
    assert torch.equal(standins.sample(model), dense)


def test_a_preset_that_another_node_gives_has_to_be_one():
    with pytest.raises(ValueError, match="preset 'Fast' is none of auto, quality, balanced, fast, custom"):
        DiffSparseAttention().patch(standins.patcher(), preset="Fast")


def test_a_plan_file_that_is_not_there_is_said_before_anything_runs(tmp_path):
    check = DiffSparseAttention.VALIDATE_INPUTS
    assert check(plan_file="none") is True
    for name in ("gone.safetensors", "../gone.safetensors"):
        assert "is no plan file in" in check(plan_file=name)


# ComfyUI gives None for what another node says.
@pytest.mark.parametrize("plan_file", ["plan.safetensors", None])
def test_a_new_file_of_the_same_name_is_read_again(plan_file, tmp_path):
    file = tmp_path / "models" / "diffsparse" / "plan.safetensors"
    file.parent.mkdir(parents=True)
    stamps = []
    for seconds in (10, 20):
        file.touch()
        os.utime(file, (seconds, seconds))
        stamps.append(DiffSparseAttention.IS_CHANGED(plan_file=plan_file, model=None))
    assert stamps[0] != stamps[1]
    assert DiffSparseAttention.IS_CHANGED(plan_file="none") == DiffSparseAttention.IS_CHANGED()


@pytest.mark.parametrize(("asked", "expected"), [(-1, None), (0, 0), (123, 123)])
def test_short_sequences_are_found_by_timing_unless_min_tokens_is_set(asked, expected):
    sparse = DiffSparseAttention().patch(standins.patcher(), min_tokens=asked)[0]
    assert sparse.get_attachment("diffsparse")._settings.config.min_tokens == expected

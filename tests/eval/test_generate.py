from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from diffsparse.eval import generate as generate_module
from diffsparse.eval.generate import Sampling, choose_device, generate, load_pipeline, sparse_attention


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return load_pipeline(tiny_model, "cpu")


@pytest.fixture(scope="module")
def sampling(tiny_model):
    return Sampling.read(tiny_model)


def change(folder, **values):
    file = folder / "demo.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_video_has_the_size_asked_for_and_the_seed_decides_it(pipe, sampling):
    first, again, other = (generate(pipe, "a cat", seed, sampling) for seed in (1, 1, 2))
    assert first.frames.shape == (9, 64, 64, 3)
    assert first.frames.min() >= 0
    assert first.frames.max() <= 1
    assert np.array_equal(first.frames, again.frames)
    assert not np.array_equal(first.frames, other.frames)


def test_each_step_is_timed_and_told(pipe, sampling, monkeypatch):
    # A clock that counts how often it is read: start, first call of the transformer, three steps, end.
    ticks = iter(range(100))
    monkeypatch.setattr(generate_module.time, "perf_counter", lambda: float(next(ticks)))
    steps = []
    made = generate(pipe, "a cat", 0, sampling, on_step=lambda: steps.append(1))
    assert made.step_seconds == (1.0, 1.0, 1.0)
    assert made.total_seconds == 5.0
    assert made.other_seconds == 2.0
    assert made.seconds_per_step == 1.0
    assert len(steps) == 3


def test_generating_leaves_no_hook_behind_even_when_stopped(pipe, sampling):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, "a cat", 0, sampling, on_step=stop)
    assert not pipe.transformer._forward_pre_hooks
    generate(pipe, "a cat", 0, sampling)


def test_sparse_attention_ends_with_its_block_even_after_an_error(pipe):
    def fails():
        with sparse_attention(pipe, "fast") as report:
            assert report().density is None
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not pipe.is_sparse_attention_enabled


def test_a_pipeline_is_loaded_in_float32_whatever_its_files_hold(pipe, tmp_path, tiny_model):
    from diffusers import WanPipeline

    WanPipeline.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    loaded = load_pipeline(tmp_path / "half", "cpu")
    assert {part.dtype for part in (loaded.transformer, loaded.vae, loaded.text_encoder)} == {torch.float32}


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_damaged_file_is_an_error_that_names_the_model(own_tiny_model, file):
    contents = (own_tiny_model / file).read_bytes()
    (own_tiny_model / file).write_bytes(contents[: len(contents) // 2])
    with pytest.raises(ValueError, match=r"broken-model.*Install diffsparse again"):
        load_pipeline(own_tiny_model, "cpu")


@pytest.mark.parametrize(
    "file", ["transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
)
def test_a_missing_file_of_weights_is_an_error(own_tiny_model, file):
    (own_tiny_model / file).unlink()
    with pytest.raises(ValueError, match="broken-model"):
        load_pipeline(own_tiny_model, "cpu")


@pytest.mark.parametrize("file", ["model_index.json", "demo.json"])
def test_a_folder_without_settings_is_an_error_that_names_the_file(own_tiny_model, file):
    (own_tiny_model / file).unlink()
    with pytest.raises(ValueError, match=file):
        Sampling.read(own_tiny_model)


@pytest.mark.parametrize("contents", ["", "{", "[]", "{}", '{"height": 64}'])
def test_damaged_settings_are_an_error(own_tiny_model, contents):
    (own_tiny_model / "demo.json").write_text(contents)
    with pytest.raises(ValueError, match=r"demo\.json is damaged"):
        Sampling.read(own_tiny_model)


@pytest.mark.parametrize("value", [0, -1, None, "64", True])
def test_settings_that_are_no_positive_numbers_are_an_error(own_tiny_model, value):
    change(own_tiny_model, height=value)
    with pytest.raises(ValueError, match="height"):
        Sampling.read(own_tiny_model)


def test_more_settings_than_needed_do_no_harm(own_tiny_model, sampling):
    change(own_tiny_model, negative_prompt="")
    assert Sampling.read(own_tiny_model) == sampling


def test_settings_are_utf_8_whatever_the_locale(own_tiny_model):
    file = own_tiny_model / "demo.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"notes": "試し"}, ensure_ascii=False), "utf-8")
    code = "import pathlib, sys; from diffsparse.eval.generate import *; Sampling.read(pathlib.Path(sys.argv[1]))"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, own_tiny_model], env=os.environ | locale, check=True)


def test_the_cpu_is_always_there_and_other_devices_are_not_invented():
    assert choose_device("cpu") == "cpu"
    assert torch.device(choose_device(None))
    for name in ("cuda:99", "toaster"):
        with pytest.raises(ValueError, match=f"{name}.*cpu"):
            choose_device(name)

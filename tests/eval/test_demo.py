from __future__ import annotations

import json
import os

import imageio.v3
import imageio_ffmpeg
import numpy as np
import pytest

import diffsparse
from diffsparse import Adaptive, SparseAttentionConfig
from diffsparse.eval import cli, demo
from diffsparse.eval.generate import Sampling, generate, load_pipeline
from diffsparse.eval.lpips_metric import NoLpips
from diffsparse.eval.metrics import psnr_db
from diffsparse.eval.prompts import SHIPPED
from diffsparse.eval.video_io import read_frames

PRODUCTS = {"dense.mp4", "sparse.mp4", "side_by_side.mp4", "head_classes.png", "report.json"}


@pytest.fixture(autouse=True)
def sparse_on_tiny_models(monkeypatch, tmp_path):
    """The presets leave short sequences dense; LPIPS must not be looked for on this machine."""
    config = SparseAttentionConfig(
        Adaptive(density=0.3, query_block_size=16, key_block_size=16), dense_steps=0.4, min_tokens=0
    )
    monkeypatch.setattr(demo, "as_config", lambda preset: config)
    monkeypatch.setattr(demo, "lpips_or_reason", lambda net, backbone: NoLpips("alex", "n/a: get it at this address"))


@pytest.fixture
def never_generate(monkeypatch):
    monkeypatch.setattr(demo, "generate", lambda *args, **kwargs: pytest.fail("generated before the error"))
    monkeypatch.setattr(demo, "load_pipeline", lambda *args, **kwargs: pytest.fail("loaded before the error"))


@pytest.fixture
def no_videos(monkeypatch):
    """For tests of something else: encoding takes longest."""
    monkeypatch.setattr(demo, "write_video", lambda *args: None)


def run(output, model, *more):
    return cli.main(["demo", "--output", str(output), "--model", str(model), "--device", "cpu", *more])


def names_in(folder):
    return {file.name for file in folder.iterdir()}


def the_error(capsys):
    error = capsys.readouterr().err
    assert error.startswith("diffsparse: error: ")
    assert error.count("\n") == 1
    return error


def test_a_run_writes_everything_and_its_report_is_true(tiny_model, tmp_path, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(demo, "generate", lambda *args, **kw: made.append(generate(*args, **kw)) or made[-1])
    assert run(tmp_path / "out", tiny_model, "--prompt", "a cat", "--seed", "3") == 0
    assert names_in(tmp_path / "out") == PRODUCTS
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    dense, sparse = made[-2:]

    expected = psnr_db(dense.frames, sparse.frames)
    assert report["quality"]["psnr_db"]["per_frame"] == pytest.approx(expected)
    assert np.isfinite(expected).all()
    assert report["quality"]["lpips"].startswith("n/a")
    assert report["dense"]["total_seconds"] == dense.total_seconds
    assert report["speed_up"]["total"] == pytest.approx(dense.total_seconds / sparse.total_seconds)
    # Three steps, two guidance branches, two layers; 0.4 of three steps is one dense step.
    (attention,) = report["attention"]["transformers"]
    assert (attention["sparse_calls"], attention["dense_calls"]) == (8, 4)
    assert sum(attention["dense_reasons"].values()) == 4
    assert report["prompt"] == "a cat"
    assert "--seed 3" in report["command"]

    for name in ("dense.mp4", "sparse.mp4", "side_by_side.mp4"):
        assert sum(1 for _ in read_frames(tmp_path / "out" / name)) == 9
    assert imageio.v3.imread(tmp_path / "out" / "head_classes.png").size
    shown = capsys.readouterr().out
    for words in ("per denoising step", "PSNR", "SSIM", "get it at this address", "density of the sparse calls"):
        assert words in shown


@pytest.mark.usefixtures("no_videos")
def test_the_dense_video_is_that_of_a_stock_pipeline(tiny_model, tmp_path):
    frames = []
    original = demo.compare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "compare", lambda windows, lpips: frames.extend(windows) or original(windows, lpips))
        assert run(tmp_path / "out", tiny_model, "--prompt", "a cat") == 0
    stock = generate(load_pipeline(tiny_model, "cpu"), "a cat", 0, Sampling.read(tiny_model))
    ((dense, sparse),) = frames
    assert np.array_equal(dense, stock.frames)
    assert not np.array_equal(sparse, stock.frames)


def test_a_video_too_short_to_be_sparse_is_said_to_be(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "as_config", diffsparse.config.as_config)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "head_classes.png").write_text("of an earlier run")
    assert run(tmp_path / "out", tiny_model, "--prompt", "a cat") == 0
    assert names_in(tmp_path / "out") == PRODUCTS - {"head_classes.png"}
    shown = capsys.readouterr().out
    assert "Sparse attention never ran" in shown
    assert "infinite (equal)" in shown


@pytest.mark.usefixtures("no_videos")
def test_steps_can_be_chosen(tiny_model, tmp_path):
    assert run(tmp_path / "out", tiny_model, "--prompt", "a cat", "--steps", "1") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["dense"]["step_seconds"]) == len(report["sparse"]["step_seconds"]) == 1


@pytest.mark.usefixtures("no_videos")
def test_a_prompt_longer_than_the_model_reads_is_said_to_be_cut(tiny_model, tmp_path, capsys):
    assert run(tmp_path / "out", tiny_model, "--prompt", "x" * 40, "--steps", "1") == 0
    assert "reads only the first 24" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("no_videos")
def test_the_first_of_the_shipped_prompts_is_the_default(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\na red disc\na blue square\n")
    monkeypatch.setitem(SHIPPED, "demo", tmp_path / "prompts.txt")
    assert run(tmp_path / "out", tiny_model, "--steps", "1") == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["prompt"] == "a red disc"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "  "], "--prompt is empty"),
        (["--prompt", os.fsdecode(b"caf\xe9")], r"--prompt 'caf\udce9' has bytes that are no text in this locale"),
        (["--prompt", "x", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["--prompt", "x", "--seed", "-1"], "--seed must be between 0"),
        (["--prompt", "x", "--device", "toaster"], "'toaster'"),
    ],
)
@pytest.mark.usefixtures("never_generate")
def test_wrong_arguments_are_found_before_loading(tiny_model, tmp_path, capsys, arguments, words):
    assert run(tmp_path / "out", tiny_model, *arguments) == 2
    assert words in the_error(capsys)


def test_an_unknown_preset_is_an_error_that_lists_them(tiny_model, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "out", tiny_model, "--preset", "turbo")
    assert stop.value.code == 2
    assert "balanced" in capsys.readouterr().err


@pytest.mark.usefixtures("never_generate")
def test_an_output_that_cannot_be_written_is_found_before_loading(tiny_model, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert run(tmp_path / "file" / "out", tiny_model, "--prompt", "x") == 2
    assert "--output" in the_error(capsys)


@pytest.mark.usefixtures("never_generate")
@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user whom permissions stop")
def test_a_read_only_output_is_found_before_loading(tiny_model, tmp_path, capsys):
    (tmp_path / "out").mkdir(mode=0o555)
    assert run(tmp_path / "out", tiny_model, "--prompt", "x") == 2
    assert "--output" in the_error(capsys)


@pytest.mark.usefixtures("never_generate")
def test_no_ffmpeg_is_found_before_loading(tiny_model, tmp_path, monkeypatch, capsys):
    def none():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", none)
    assert run(tmp_path / "out", tiny_model, "--prompt", "x") == 2
    assert "There is no ffmpeg here" in the_error(capsys)


@pytest.mark.usefixtures("never_generate")
def test_a_missing_model_is_an_error(tmp_path, capsys):
    assert run(tmp_path / "out", tmp_path / "no-model", "--prompt", "x") == 2
    assert "no-model" in the_error(capsys)


def test_a_corrupt_model_is_an_error_in_one_line(own_tiny_model, tmp_path, capsys):
    weights = own_tiny_model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert run(tmp_path / "out", own_tiny_model, "--prompt", "x") == 2
    assert "cannot be loaded" in the_error(capsys)
    assert names_in(tmp_path / "out") == set()


@pytest.mark.parametrize("generation", [1, 2, 3, 4])
def test_ctrl_c_while_generating_leaves_no_file(tiny_model, tmp_path, monkeypatch, capsys, generation):
    calls = []

    def stop_inside(pipe, prompt, seed, sampling, on_step):
        calls.append(1)

        def stop():
            raise KeyboardInterrupt

        return generate(pipe, prompt, seed, sampling, on_step=stop if len(calls) == generation else on_step)

    monkeypatch.setattr(demo, "generate", stop_inside)
    assert run(tmp_path / "out", tiny_model, "--prompt", "x") == 130
    assert capsys.readouterr().err == "diffsparse: interrupted\n"
    assert names_in(tmp_path / "out") == set()


@pytest.mark.parametrize("product", sorted(PRODUCTS))
def test_ctrl_c_while_writing_leaves_only_whole_files(tiny_model, tmp_path, monkeypatch, product):
    replace = os.replace

    def stop_at(source, target):
        if os.path.basename(target) == product:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_at)
    assert run(tmp_path / "out", tiny_model, "--prompt", "x", "--steps", "2") == 130
    assert names_in(tmp_path / "out") < PRODUCTS
    assert product not in names_in(tmp_path / "out")


@pytest.mark.skipif(not demo.MODEL.is_dir(), reason="the embedded model is not there")
def test_the_embedded_model_can_be_loaded(tmp_path):
    assert Sampling.read(demo.MODEL).num_inference_steps >= 1
    assert load_pipeline(demo.MODEL, "cpu").transformer is not None

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from diffusers import WanPipeline

from diffsparse.eval import train_demo_transformer
from diffsparse.eval.demo_tokenizer import build_tokenizer
from diffsparse.eval.synthetic_video import random_scene, render
from diffsparse.eval.train_demo import load, train
from diffsparse.eval.train_demo_export import call_settings, export_pipeline
from diffsparse.eval.train_demo_latents import LatentPool, encoded_frames, fit_demo_vae
from diffsparse.eval.train_demo_transformer import GPU_PHASES, PHASES, Phase, Recipe, build_model, flow_matching_loss
from diffsparse.eval.training_run import TrainingRun, WeightAverage

GRID = (3, 2, 2)
STEPS = 100
TINY = Recipe(
    latent_channels=4,
    num_heads=1,
    head_dim=16,
    num_layers=1,
    ffn_dim=16,
    text_dim=16,
    phases=(Phase(0.5, (2, 2, 2), batch=4, new_clips=1), Phase(1.0, GRID, batch=4, new_clips=1)),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    parts = train(folder, minutes=5, seed=0, recipe=TINY, steps=STEPS)
    return folder, parts


def test_loss_falls(trained):
    folder, _ = trained
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0], losses


def test_everything_of_a_step_is_on_the_device_of_the_model():
    """On meta tensors, which take no other device beside them and have no values that the CPU could wait for."""
    tokenizer = build_tokenizer(num_captions=50)
    generator = torch.Generator().manual_seed(0)
    video = render(random_scene(generator), 3, 16, 16, device="meta")
    assert video.device.type == "meta"
    with torch.device("meta"):
        model = build_model(len(tokenizer), TINY)
    latents = torch.empty(2, 4, 3, 2, 2, device="meta")
    loss = flow_matching_loss(model, tokenizer, latents, ["a red circle", "a star"], generator)
    assert loss.device.type == "meta"


@pytest.mark.parametrize(("is_fast", "num_optimizers"), [(False, 1), (True, 2)])
def test_with_and_without_bfloat16_it_trains_and_goes_on(is_fast, num_optimizers, tmp_path, monkeypatch):
    monkeypatch.setattr(train_demo_transformer, "has_fast_bfloat16", lambda device: is_fast)
    for steps in (10, 15):
        train(tmp_path, minutes=5, seed=0, recipe=TINY, steps=steps, batch_scale=2)
    saved = torch.load(tmp_path / "transformer.pt")
    assert saved["step"] == 15
    assert len(saved["state"]["optimizers"]) == num_optimizers
    assert all(value.isfinite().all() for value in saved["state"]["average"].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_trains_goes_on_and_comes_back(tmp_path):
    for steps in (10, 15):
        _, model, _ = train(tmp_path, minutes=5, seed=0, recipe=TINY, steps=steps, device="cuda")
    assert torch.load(tmp_path / "transformer.pt", map_location="cpu")["step"] == 15
    assert {value.device.type for value in model.state_dict().values()} == {"cpu"}
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_for_the_gpu(tmp_path, monkeypatch):
    """CUDA's own watch for it is on from the second step, when all that is needed once is there, to the last."""
    grow = LatentPool.grow

    def watched(pool, count, generator):
        if len(pool.clips) > 4:
            torch.cuda.set_sync_debug_mode("error")
        grow(pool, count, generator)

    monkeypatch.setattr(LatentPool, "grow", watched)
    monkeypatch.setattr(TrainingRun, "save", lambda run, state: torch.cuda.set_sync_debug_mode("default"))
    phases = (Phase(1.0, GRID, batch=4, new_clips=1),)
    try:
        train(tmp_path, minutes=5, seed=0, recipe=replace(TINY, phases=phases), steps=6, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("batch_scale", [1, 3])
def test_a_larger_batch_renders_no_more_clips_a_step(batch_scale, tmp_path, monkeypatch):
    grown = []

    def grow(pool, count, generator):
        grown.append(count)
        pool.clips += [(torch.zeros(4, *GRID), "a red circle")] * count

    monkeypatch.setattr(LatentPool, "grow", grow)
    phases = (Phase(1.0, GRID, batch=4, new_clips=2, first_clips=7),)
    train(tmp_path, minutes=5, seed=0, recipe=replace(TINY, phases=phases), steps=3, batch_scale=batch_scale)
    assert grown == [max(7, 4 * batch_scale), 2, 2, 2]


@pytest.mark.parametrize("phases", [PHASES, GPU_PHASES], ids=["cpu", "gpu"])
def test_a_schedule_fills_the_time_and_ends_on_the_grid_that_is_sampled(phases):
    shares = [phase.until for phase in phases]
    assert shares == sorted(set(shares))
    assert shares[-1] == 1.0
    assert phases[-1].grid == PHASES[-1].grid


def test_all_frames_at_once_are_encoded_as_the_autoencoder_encodes_a_clip():
    vae = fit_demo_vae(0, num_components=4, num_clips=8, side=16)
    generator = torch.Generator().manual_seed(0)
    video = torch.stack([render(random_scene(generator), 5, 16, 24) for _ in range(2)])
    with torch.no_grad():
        wanted = vae.encode(video * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(encoded_frames(vae, video), wanted)


def test_the_pool_holds_each_clip_with_its_caption_and_drops_the_oldest():
    vae = fit_demo_vae(0, num_components=4, num_clips=8, side=16)
    pool = LatentPool(vae, GRID, capacity=40)
    pool.grow(45, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    captions = [random_scene(generator).caption for _ in range(45)]
    assert [caption for _, caption in pool.clips] == captions[5:]
    assert pool.clips[0][0].shape == (4, *GRID)


def test_the_average_follows_the_weights_of_a_model_that_goes_on():
    model = torch.nn.Linear(2, 2)
    average = WeightAverage(model, decay=0.5)
    start = model.weight.detach().clone()
    model.load_state_dict({"weight": start + 1, "bias": model.bias})
    # past the first steps, which fade sooner
    average.update(step=100)
    torch.testing.assert_close(average.weights["weight"], start + 0.5)
    average.resume({"weight": start, "bias": model.bias.detach()})
    torch.testing.assert_close(average.weights["weight"], start)


def test_an_autoencoder_that_a_run_was_started_with_is_kept(trained, tmp_path):
    """On a machine whose linear algebra gives other signs, a new fit would not match the transformer."""
    folder, (vae, _, _) = trained
    moved = shutil.copytree(folder, tmp_path / "moved")
    other = fit_demo_vae(seed=1, num_components=4)
    other.save_pretrained(moved / "vae")
    for where, wanted in ((folder, vae), (moved, other)):
        loaded, _, tokenizer = load(where, 0, TINY)
        torch.testing.assert_close(loaded.state_dict(), wanted.state_dict(), rtol=0, atol=0)
        assert loaded.config.latents_mean == wanted.config.latents_mean
        assert tokenizer.padding_side == "right"


def test_every_grid_gets_its_share_of_the_time(trained):
    folder, _ = trained
    grids = [json.loads(line)["grid"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(grids)) == ["2x2x2", "3x2x2"]


def test_a_finished_run_is_not_trained_again(trained):
    folder, (_, model, _) = trained
    step = torch.load(folder / "transformer.pt")["step"]
    _, again, _ = train(folder, minutes=5, seed=0, recipe=TINY, steps=STEPS)
    assert torch.load(folder / "transformer.pt")["step"] == step
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_more_time_goes_on_from_the_same_step(trained, tmp_path):
    folder, _ = trained
    (tmp_path / "transformer.pt").write_bytes((folder / "transformer.pt").read_bytes())
    train(tmp_path, minutes=5, seed=0, recipe=TINY, steps=STEPS + 5)
    before, after = (torch.load(path / "transformer.pt") for path in (folder, tmp_path))
    assert (before["step"], after["step"]) == (STEPS, STEPS + 5)
    assert after["used"] > before["used"]
    embedding = "text_encoder.shared.weight"
    assert not torch.equal(after["state"]["model"][embedding], before["state"]["model"][embedding])


def test_time_is_counted_over_interruptions(tmp_path):
    run = TrainingRun(tmp_path, "stage", seconds=100.0)
    run._used_before, run.step = 40.0, 7
    run.save({})
    again = TrainingRun(tmp_path, "stage", seconds=100.0)
    assert again.resume() == {}
    assert again.step == 7
    assert again.progress() == pytest.approx(0.4, abs=0.01)


def test_a_cut_while_saving_leaves_the_old_checkpoint(tmp_path):
    run = TrainingRun(tmp_path, "stage", seconds=1.0)
    run.save({"loss": 1})
    with pytest.raises(AttributeError):
        # a local function cannot be pickled: the write breaks off in the middle
        run.save({"loss": 2, "broken": lambda: None})
    assert run.resume() == {"loss": 1}


def test_export_loads_and_runs(trained, tmp_path):
    folder, _ = trained
    export_pipeline(tmp_path, *load(folder, 0, TINY), GRID)
    pipe = WanPipeline.from_pretrained(tmp_path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    settings = json.loads((tmp_path / "demo.json").read_text())
    settings.pop("fps")
    assert settings == call_settings(GRID)
    settings["num_inference_steps"] = 2
    video = pipe("a red circle", generator=torch.Generator().manual_seed(0), output_type="pt", **settings).frames
    assert video.shape == (1, 3, 3, 16, 16)
    assert video.isfinite().all()


def test_load_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"transformer\.pt"):
        load(tmp_path, 0, TINY)


def test_tokenizer_round_trips_any_text_and_knows_caption_words():
    tokenizer = build_tokenizer(num_captions=300)
    for text in ("a red circle moves left", "日本 — naïve\t😀"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    caption = random_scene(torch.Generator().manual_seed(7)).caption
    assert len(tokenizer(caption).input_ids) <= 2 * len(caption.split()) + 1
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from diffusers import WanPipeline

from diffsparse.eval import train_demo_transformer
from diffsparse.eval.demo_tokenizer import build_tokenizer
from diffsparse.eval.synthetic_video import random_scene, render
from diffsparse.eval.train_demo import Recipe, load, train
from diffsparse.eval.train_demo_export import call_settings, export_pipeline
from diffsparse.eval.train_demo_transformer import Phase, build_model, flow_matching_loss
from diffsparse.eval.training_run import TrainingRun, save_atomically

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


class Encoder(torch.nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def forward(self, token_ids, mask):
        return SimpleNamespace(last_hidden_state=self.embedding(token_ids))


def test_everything_of_a_step_is_on_the_device_of_the_model():
    """On meta tensors, which take no other device beside them."""
    tokenizer = build_tokenizer(num_captions=50)
    generator = torch.Generator().manual_seed(0)
    video = render(random_scene(generator), 3, 16, 16, device="meta")
    assert video.device.type == "meta"
    with torch.device("meta"):
        model = build_model(len(tokenizer), latent_channels=4, num_heads=1, head_dim=16, num_layers=1, ffn_dim=16)
        # transformers' own encoder looks at the values of the mask, and there are none.
        embedding = torch.nn.Embedding(len(tokenizer), 128)
    model.text_encoder = Encoder(embedding)
    latents = torch.empty(2, 4, 3, 2, 2, device="meta")
    loss = flow_matching_loss(model, tokenizer, latents, ["a red circle", "a star"], generator)
    assert loss.device.type == "meta"


def test_a_cpu_without_bfloat16_trains_too(tmp_path, monkeypatch):
    monkeypatch.setattr(train_demo_transformer, "has_fast_bfloat16", lambda device: False)
    train(tmp_path, minutes=5, seed=0, recipe=TINY, steps=20, batch_scale=2)
    saved = torch.load(tmp_path / "transformer.pt")
    assert len(saved["state"]["optimizers"]) == 1
    assert all(value.isfinite().all() for value in saved["state"]["average"].values())


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
    path = tmp_path / "state.pt"
    save_atomically({"step": 1}, path)
    with pytest.raises(AttributeError):
        # a local function cannot be pickled: the write breaks off in the middle
        save_atomically({"step": 2, "broken": lambda: None}, path)
    assert torch.load(path) == {"step": 1}


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

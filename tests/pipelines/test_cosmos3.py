"""Cosmos 3: text by causal attention of its own, then video and sound, whose queries see all; shared keys."""

import types
from dataclasses import replace
from unittest.mock import MagicMock

import diffusers
import pytest
import torch
from composition.test_batches import STATIC
from diffusers.models import attention_dispatch
from enabled import FULL, Watched, config, report_of, run
from tiny.cosmos3 import call, make
from tiny.model import TEXT_TOKENS
from tiny_models import tiny_wan_pipeline

from diffsparse import processors
from diffsparse.grid import TokenGrid
from diffsparse.pipelines.cosmos3 import COSMOS3, layout

GRID = (3, 7, 5)


@pytest.mark.parametrize(("num_text", "num_sound"), [(TEXT_TOKENS, 0), (TEXT_TOKENS, 6), (105, 0), (120, 6)])
def test_video_and_sound_are_as_exact_as_stock(num_text, num_sound):
    model = make()
    arguments = call(model, GRID, num_sound=num_sound, num_text=num_text)

    def outputs():
        with torch.no_grad():
            video, sound, _ = model(**arguments, return_dict=False)
        return video + (sound or [])

    stock = outputs()
    assert len(stock) == 1 + bool(num_sound)
    model.enable_sparse_attention(FULL)
    torch.testing.assert_close(outputs(), stock)
    model.disable_sparse_attention()
    model.enable_sparse_attention(config(strategy := Watched(density=0.3), strict=True))
    assert not torch.allclose(outputs()[0], stock[0], atol=1e-4)
    assert {each.grid for each in strategy.calls} == {TokenGrid(*GRID, text_after=num_text + num_sound)}
    # The causal attention of the text is not counted.
    assert (report_of(model).sparse_calls, report_of(model).dense_calls) == (2, 0)


def test_its_text_is_always_seen():
    # One layer, and a plan that goes by the grid: the text reaches a token by its own attention or not at all.
    model = make(num_hidden_layers=1)
    arguments = call(model, GRID)
    model.enable_sparse_attention(STATIC)
    before = run(model, arguments)
    assert report_of(model).density < 0.7
    arguments["input_ids"] = torch.tensor([*range(TEXT_TOKENS - 1), 19])
    assert ((run(model, arguments) - before).abs().amax(dim=-4) > 0).all()


def test_what_stays_dense_under_context_parallelism_is_counted(monkeypatch):
    model = make()
    model.enable_sparse_attention(FULL)
    run(model, call(model, GRID))
    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", lambda query, *_, **__: query)
    monkeypatch.setattr(processors._CURRENT, "handle", model.layers[0].self_attn.processor._diffsparse_handle)
    ulysses = types.SimpleNamespace(context_parallel_config=types.SimpleNamespace(ring_degree=1, ulysses_degree=2))
    # What one of two ranks has of the video, and of all keys; then of the text.
    for queries, keys, is_causal in ((53, 56, False), (4, 4, True)):
        query, key = torch.zeros(1, queries, 4, 8), torch.zeros(1, keys, 2, 8)
        options = {"is_causal": is_causal, "enable_gqa": True, "parallel_config": ulysses}
        processors.dispatch_attention_fn(query, key, key, **options)
    assert report_of(model).dense_reasons == {"grouped queries under context parallelism": 1}


def test_two_videos_have_no_layout():
    model = make()
    arguments = call(model, GRID)
    arguments["vision_tokens"] = [arguments["vision_tokens"][0]] * 2
    assert layout(model, arguments | {"vision_token_shapes": [GRID, GRID]}) is None


def test_without_a_layout_all_is_counted():
    model = make()
    model.enable_sparse_attention(FULL, family=replace(COSMOS3, layout=lambda transformer, call: None))
    run(model, call(model, GRID))
    reasons = {"causal attention or dropout": 2, "the call does not say the size of the grid": 2}
    assert report_of(model).dense_reasons == reasons


def test_its_pipeline_is_as_exact_as_stock_and_runs_sparse_but_for_early_steps():
    vae = tiny_wan_pipeline().vae
    tokenizer = MagicMock()
    tokenizer.convert_tokens_to_ids.return_value = 1
    tokenizer.eos_token_id = 2
    pipe = diffusers.Cosmos3OmniPipeline(
        transformer=make(latent_channel=16, patch_latent_dim=64),
        text_tokenizer=tokenizer,
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        enable_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.tokenize_prompt = lambda *_, **__: ([3, 4, 5, 6], [3, 4])

    def generate():
        size = {"num_frames": 9, "height": 48, "width": 80, "num_inference_steps": 3, "output_type": "latent"}
        return pipe(prompt="a cat", generator=torch.Generator().manual_seed(0), **size).video

    stock = generate()
    pipe.enable_sparse_attention(FULL)
    torch.testing.assert_close(generate(), stock)
    pipe.disable_sparse_attention()
    pipe.enable_sparse_attention(config(strategy := Watched(density=0.5), dense_steps=0.34, strict=True))
    assert not torch.allclose(generate(), stock, atol=1e-4)
    # Both guidance branches, whose texts differ in length.
    assert {each.grid for each in strategy.calls} == {TokenGrid(3, 3, 5, text_after=text) for text in (2, 4)}
    assert report_of(pipe).sparse_calls == 2 * 2 * 2
    assert report_of(pipe).dense_reasons == {"early step": 2 * 2}

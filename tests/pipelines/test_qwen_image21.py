"""Qwen-Image 2.1: the keys of what stands before the image are kept, and the image alone has queries."""

from dataclasses import replace
from unittest.mock import MagicMock

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21FlexAttnProcessor, QwenImage21KVCache
from enabled import FULL, Watched, config, report_of, run
from tiny.model import CHANNELS, TEXT_CHANNELS, TEXT_TOKENS, Random
from tiny.qwen_image21 import first_call, make
from tiny_pipelines import text, without_encoders

from diffsparse.grid import TokenGrid
from diffsparse.pipelines.family import Layout
from diffsparse.pipelines.qwen_image21 import layout

GRID = (1, 6, 10)
EDITED = (1, 4, 6)


def edit_call(model):
    """Text of 3 tokens, an image to edit, 4 more of text, then the image."""
    call = first_call(model, GRID, batch=2)
    slots = EDITED[1] * EDITED[2] // 4
    is_image = torch.tensor([False] * 3 + [True] * slots + [False] * 4 + [True] * 15)
    random = Random(1)
    return call | {
        "hidden_states": random(2, 4 * slots + 60, CHANNELS),
        "encoder_hidden_states": random(2, TEXT_TOKENS + slots, call["encoder_hidden_states"].shape[2]),
        "img_shapes": [[EDITED, GRID]] * 2,
        "img_mask": is_image.expand(2, -1),
    }


def two_steps(model, call):
    """The step that fills the cache, and one that goes by it."""
    cache = QwenImage21KVCache(len(model.transformer_blocks))
    modes = ({"kv_cache": cache, "kv_cache_mode": mode} for mode in ("extract", "cached"))
    return [run(model, call | mode | {"timestep": call["timestep"] / n}) for n, mode in enumerate(modes, 1)]


@pytest.mark.parametrize("hidden", [[], [6], [1, 2]], ids=str)
@pytest.mark.parametrize("edits", [False, True])
def test_every_step_is_as_exact_as_stock(edits, hidden):
    model = make()
    call = edit_call(model) if edits else first_call(model, GRID, batch=2)
    call["encoder_hidden_states_mask"] = mask = torch.ones(call["encoder_hidden_states"].shape[:2], dtype=torch.bool)
    mask[1, hidden] = False
    assert layout(model, call) == Layout(*GRID, text_before=TEXT_TOKENS + (24 if edits else 0))
    stock = two_steps(model, call)
    model.enable_sparse_attention(FULL)
    for sparse, dense in zip(two_steps(model, call), stock):
        torch.testing.assert_close(sparse, dense)
    report = report_of(model)
    assert report.sparse_calls == 2 * 2
    # Pieces of what stands before the image have calls of their own in the first step, which nobody counts.
    assert report.dense_calls == 0


@pytest.mark.parametrize("num_text", [60, 71])
def test_as_much_text_as_image_is_as_exact_as_stock_too(num_text):
    model = make()
    call = first_call(model, GRID) | {
        "encoder_hidden_states": Random(1)(1, num_text, TEXT_CHANNELS),
        "encoder_hidden_states_mask": torch.ones(1, num_text, dtype=torch.bool),
        "img_mask": torch.arange(num_text + 60 // 4)[None] >= num_text,
    }
    stock = two_steps(model, call)
    model.enable_sparse_attention(replace(FULL, strict=True))
    for sparse, dense in zip(two_steps(model, call), stock):
        torch.testing.assert_close(sparse, dense)
    assert (report_of(model).sparse_calls, report_of(model).dense_calls) == (2 * 2, 0)


def test_its_pipeline_runs_sparse_but_for_early_steps():
    pipeline = without_encoders(
        diffusers.QwenImage21Pipeline,
        transformer=make(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        processor=MagicMock(),  # whose template is looked at when the pipeline is made
    )
    mask = torch.arange(TEXT_TOKENS)[None] < 4
    pipeline.encode_prompt = lambda **_: (text(), mask, torch.zeros_like(mask))
    call = {"prompt": "a cat", "negative_prompt": "", "true_cfg_scale": 2.0, "height": 96, "width": 160}
    pipeline.enable_sparse_attention(config(strategy := Watched(density=0.5), dense_steps=0.34, strict=True))
    for _ in range(2):
        pipeline(**call, num_inference_steps=3, output_type="latent")
    assert {call.grid for call in strategy.calls} == {TokenGrid(*GRID, text_after=TEXT_TOKENS)}
    report = report_of(pipeline)
    # Two generations of three steps of two branches and layers.
    assert report.sparse_calls == 2 * 2 * 2 * 2
    assert report.dense_reasons == {"early step": 2 * 1 * 2 * 2}
    assert report.density < 1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_first_step_of_its_other_processor_is_the_models_own_block_mask():
    model = make()
    model.set_attn_processor(QwenImage21FlexAttnProcessor())
    call = first_call(model, GRID, batch=2)
    stock = two_steps(model, call)
    model.enable_sparse_attention(FULL)
    for sparse, dense in zip(two_steps(model, call), stock):
        torch.testing.assert_close(sparse, dense)
    assert report_of(model).sparse_calls == 2
    assert report_of(model).dense_reasons == {"the model's own block mask": 2}

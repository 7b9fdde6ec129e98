"""A tiny Kandinsky 6: video, and audio beside it."""

from typing import Any

import torch
from tiny.model import (
    CHANNELS,
    HEAD_DIM,
    HEADS,
    TEXT_CHANNELS,
    TEXT_TOKENS,
    Grid,
    Random,
    TinyModel,
    Variant,
    class_since,
    seeded,
)

AUDIO_TOKENS = 11

make = seeded(
    class_since("0.42", "Kandinsky6Transformer3DModel"),
    {
        "in_visual_dim": CHANNELS,
        "out_visual_dim": CHANNELS,
        "in_audio_dim": CHANNELS,
        "out_audio_dim": CHANNELS,
        "in_text_dim": TEXT_CHANNELS,
        "in_text_dim2": 8,
        "time_dim": 16,
        "model_dim": HEADS * HEAD_DIM,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 3,
        "axes_dims": (8, 12, 12),
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    frames, height, width = (size * patch for size, patch in zip(grid, model.config.patch_size))
    return {
        "hidden_states": random(batch, frames, height, width, 2 * CHANNELS + 1),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "pooled_projections": random(batch, 8),
        "timestep": torch.full((batch,), 500.0),
        "audio_hidden_states": random(batch, AUDIO_TOKENS, CHANNELS),
    }


def padded_prompt(call: dict[str, Any]) -> dict[str, Any]:
    return {"encoder_attention_mask": (torch.arange(TEXT_TOKENS) < 4).expand(2, -1)}


KANDINSKY6 = TinyModel(
    make,
    call,
    layers=tuple(f"visual_transformer_blocks.{i}.video_dec_block.self_attention" for i in range(3)),
    latent_axes="bfhwc",
    variants={
        "no audio": Variant(call=lambda call: {"audio_hidden_states": None}),
        "padded prompt": Variant(call=padded_prompt),
    },
)

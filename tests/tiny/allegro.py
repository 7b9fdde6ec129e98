"""A tiny Allegro."""

from typing import Any

import torch
from diffusers import AllegroTransformer3DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, seeded

make = seeded(
    AllegroTransformer3DModel,
    {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "cross_attention_dim": HEADS * HEAD_DIM,
        "caption_channels": TEXT_CHANNELS,
        "num_layers": 3,
        "sample_width": 10,
        "sample_height": 14,
        "sample_frames": 3,
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    frames, height, width = grid
    patch = model.config.patch_size
    return {
        "hidden_states": random(batch, CHANNELS, frames, height * patch, width * patch),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": (torch.arange(TEXT_TOKENS) < 4).long().expand(batch, -1),
    }


ALLEGRO = TinyModel(make, call, layers=tuple(f"transformer_blocks.{i}.attn1" for i in range(3)))

"""A tiny LTX-Video."""

from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, seeded

make = seeded(
    LTXVideoTransformer3DModel,
    {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "cross_attention_dim": HEADS * HEAD_DIM,
        "num_layers": 3,
        "caption_channels": TEXT_CHANNELS,
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    frames, height, width = grid
    return {
        "hidden_states": random(batch, frames * height * width, model.config.in_channels),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": torch.ones(batch, TEXT_TOKENS),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


LTX = TinyModel(
    make,
    call,
    layers=tuple(f"transformer_blocks.{i}.attn1" for i in range(3)),
    latent_axes="bsc",
    compiled=True,
)

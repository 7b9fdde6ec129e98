"""A tiny Cosmos."""

from typing import Any

import torch
from diffusers import CosmosTransformer3DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, Variant, seeded

make = seeded(
    CosmosTransformer3DModel,
    {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 3,
        "text_embed_dim": TEXT_CHANNELS,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "mlp_ratio": 1.0,
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    frames, height, width = (size * patch for size, patch in zip(grid, model.config.patch_size))
    return {
        "hidden_states": random(batch, CHANNELS, frames, height, width),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "padding_mask": torch.zeros(1, 1, 8 * height, 8 * width),
        "fps": 30,
    }


def video_to_world(call: dict[str, Any]) -> dict[str, Any]:
    """A channel says which frames are given; a timestep for each frame."""
    batch, _, frames, height, width = call["hidden_states"].shape
    return {
        "condition_mask": torch.zeros(batch, 1, frames, height, width),
        "timestep": torch.full((batch, 1, frames, 1, 1), 0.5),
    }


COSMOS = TinyModel(
    make,
    call,
    layers=tuple(f"transformer_blocks.{i}.attn1" for i in range(3)),
    in_float64=False,
    variants={
        "2 video to world": Variant({"in_channels": CHANNELS + 1, "extra_pos_embed_type": None}, video_to_world),
    },
)

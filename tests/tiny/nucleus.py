"""A tiny Nucleus-Image, without experts: which one takes a token would hang on its last digit."""

from typing import Any

import torch
from diffusers import NucleusMoEImageTransformer2DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, seeded

make = seeded(
    NucleusMoEImageTransformer2DModel,
    {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "patch_size": 1,
        "num_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "joint_attention_dim": TEXT_CHANNELS,
        "axes_dims_rope": (8, 12, 12),
        "mlp_ratio": 3.0,
        "moe_enabled": False,
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    frames, height, width = grid
    return {
        "hidden_states": random(batch, frames * height * width, CHANNELS),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [grid] * batch,
    }


NUCLEUS_IMAGE = TinyModel(
    make,
    call,
    layers=tuple(f"transformer_blocks.{i}.attn" for i in range(2)),
    grid=(1, 7, 5),
    text_after=TEXT_TOKENS,
    prompt=range(-TEXT_TOKENS, 0),
    grid_queries=True,
    latent_axes="bsc",
)

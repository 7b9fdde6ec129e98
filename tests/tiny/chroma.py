"""A tiny Chroma."""

from typing import Any

import torch
from diffusers import ChromaTransformer2DModel
from tiny.flux import image_ids
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, seeded

make = seeded(
    ChromaTransformer2DModel,
    {
        "in_channels": CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT_CHANNELS,
        "axes_dims_rope": (8, 12, 12),
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 8,
        "approximator_layers": 1,
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    frames, height, width = grid
    return {
        "hidden_states": random(batch, frames * height * width, model.config.in_channels),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": image_ids(height, width),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }


CHROMA = TinyModel(
    make,
    call,
    layers=(
        *(f"transformer_blocks.{i}.attn" for i in range(2)),
        *(f"single_transformer_blocks.{i}.attn" for i in range(2)),
    ),
    grid=(1, 7, 5),
    text_before=TEXT_TOKENS,
    prompt=range(TEXT_TOKENS),
    latent_axes="bsc",
)

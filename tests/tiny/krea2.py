"""A tiny Krea 2."""

from typing import Any

import torch
from diffusers import Krea2Transformer2DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, seeded

TEXT_LAYERS = 3

make = seeded(
    Krea2Transformer2DModel,
    {
        "in_channels": CHANNELS,
        "num_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "timestep_embed_dim": 16,
        "text_hidden_dim": TEXT_CHANNELS,
        "num_text_layers": TEXT_LAYERS,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 32,
        "axes_dims_rope": (8, 12, 12),
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    _, height, width = grid
    image = torch.cartesian_prod(torch.zeros(1).long(), torch.arange(height), torch.arange(width)).float()
    return {
        "hidden_states": random(batch, height * width, CHANNELS),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_LAYERS, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 0.5),
        "position_ids": torch.cat([torch.zeros(TEXT_TOKENS, 3), image]),
    }


KREA2 = TinyModel(
    make,
    call,
    layers=tuple(f"transformer_blocks.{i}.attn" for i in range(2)),
    grid=(1, 7, 5),
    text_before=TEXT_TOKENS,
    prompt=range(TEXT_TOKENS),
    latent_axes="bsc",
)

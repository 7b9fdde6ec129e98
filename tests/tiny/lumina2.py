"""A tiny Lumina-Image 2."""

from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, seeded

make = seeded(
    Lumina2Transformer2DModel,
    {
        "patch_size": 2,
        "in_channels": CHANNELS,
        "hidden_size": HEADS * HEAD_DIM,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": HEADS,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "axes_dim_rope": (8, 12, 12),
        "axes_lens": (64, 32, 32),
        "cap_feat_dim": TEXT_CHANNELS,
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """The last two tokens of the text are padding."""
    random = Random(seed)
    _, height, width = grid
    return {
        "hidden_states": random(batch, CHANNELS, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "encoder_attention_mask": (torch.arange(TEXT_TOKENS) < TEXT_TOKENS - 2).long().expand(batch, -1),
    }


LUMINA2 = TinyModel(
    make,
    call,
    layers=("noise_refiner.0.attn", *(f"layers.{i}.attn" for i in range(2))),
    grid=(1, 7, 5),
    text_before=TEXT_TOKENS - 2,
    prompt=range(TEXT_TOKENS - 2),
    latent_axes="bchw",
)

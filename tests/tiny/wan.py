"""A tiny Wan."""

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, Variant, seeded

CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_CHANNELS,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 64,
}

make = seeded(WanTransformer3DModel, CONFIG)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    sizes = (size * patch for size, patch in zip(grid, model.config.patch_size))
    return {
        "hidden_states": random(batch, model.config.in_channels, *sizes),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
    }


def clean_first_frame(call: dict[str, Any]) -> dict[str, Any]:
    """Wan 2.2 5B: one timestep for each token."""
    return {"timestep": torch.full((2, 3 * 7 * 5), 500)}


WAN = TinyModel(
    make,
    call,
    layers=tuple(f"blocks.{i}.attn1" for i in range(3)),
    drops_unfilled_patches=True,
    positional=("hidden_states", "timestep"),
    compiled=True,
    variants={
        "image to video": Variant({"in_channels": 9, "out_channels": 4}),
        "clean first frame": Variant(call=clean_first_frame),
        "patches in time": Variant({"patch_size": (2, 2, 4)}),
    },
)

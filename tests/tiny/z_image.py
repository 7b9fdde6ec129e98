"""A tiny Z-Image."""

from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, seeded

make = seeded(
    ZImageTransformer2DModel,
    {
        "in_channels": CHANNELS,
        "dim": HEADS * HEAD_DIM,
        "n_layers": 2,
        "n_refiner_layers": 0,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "cap_feat_dim": TEXT_CHANNELS,
        "axes_dims": [8, 12, 12],
        "axes_lens": [256, 32, 32],
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    frames, height, width = grid
    return {
        "x": random(batch, CHANNELS, frames, 2 * height, 2 * width),
        "t": torch.full((batch,), 0.5),
        "cap_feats": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
    }


# 117 tokens of the image and 7 of the caption are filled up to 128 and 32.
Z_IMAGE = TinyModel(
    make,
    call,
    layers=tuple(f"layers.{i}.attention" for i in range(2)),
    grid=(1, 13, 9),
    text_after=128 - 117 + 32,
    prompt=range(128, 128 + TEXT_TOKENS),
    latents="x",
    text="cap_feats",
    positional=("x", "t", "cap_feats"),
)

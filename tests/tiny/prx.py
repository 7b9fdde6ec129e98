"""A tiny PRX."""

from typing import Any

import torch
from diffusers import PRXTransformer2DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, seeded
from torch import nn

CONFIG = {
    "in_channels": CHANNELS,
    "patch_size": 2,
    "context_in_dim": TEXT_CHANNELS,
    "hidden_size": HEADS * HEAD_DIM,
    "num_heads": HEADS,
    "depth": 2,
    "axes_dim": [16, 16],
}


def make(**changes: Any) -> nn.Module:
    model = seeded(PRXTransformer2DModel, CONFIG)(**changes)
    # They start at zero, which would hide what attention does.
    random = Random(0)
    for block in model.blocks:
        weight = block.modulation.lin.weight
        weight.copy_(random(*weight.shape) / 8)
    return model


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    _, height, width = grid
    return {
        "hidden_states": random(batch, CHANNELS, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
    }


PRX = TinyModel(
    make,
    call,
    layers=tuple(f"blocks.{i}.attention" for i in range(2)),
    grid=(1, 7, 5),
    text_before=TEXT_TOKENS,
    prompt=range(TEXT_TOKENS),
    grid_queries=True,
    latent_axes="bchw",
)

"""A tiny ERNIE-Image."""

from typing import Any

import torch
from diffusers import ErnieImageTransformer2DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, seeded
from torch import nn


def make(**changes: Any) -> nn.Module:
    model = seeded(
        ErnieImageTransformer2DModel,
        {
            "hidden_size": HEADS * HEAD_DIM,
            "num_attention_heads": HEADS,
            "num_layers": 2,
            "ffn_hidden_size": 32,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "patch_size": 1,
            "text_in_dim": TEXT_CHANNELS,
            "rope_axes_dim": (8, 12, 12),
        },
    )(**changes)
    # They start at zero, which would hide what attention does.
    random = Random(0)
    for layer in (model.adaLN_modulation[-1], model.final_linear):
        layer.weight.copy_(random(*layer.weight.shape) / 8)
    return model


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Rows of the batch have 4, 3, 2, … text tokens that are not padding."""
    random = Random(seed)
    _, height, width = grid
    return {
        "hidden_states": random(batch, CHANNELS, height, width),
        "timestep": torch.full((batch,), 500.0),
        "text_bth": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "text_lens": torch.arange(4, 4 - batch, -1),
    }


ERNIE_IMAGE = TinyModel(
    make,
    call,
    layers=tuple(f"layers.{i}.self_attention" for i in range(2)),
    grid=(1, 7, 5),
    text_after=TEXT_TOKENS,
    prompt=range(-TEXT_TOKENS, 0),
    text_lengths=(4, 3),
    text="text_bth",
    latent_axes="bchw",
)

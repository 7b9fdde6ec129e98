"""A tiny Kandinsky 5."""

from typing import Any

import torch
from diffusers import Kandinsky5Transformer3DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, Variant, seeded
from torch import nn


def make(**changes: Any) -> nn.Module:
    model = seeded(
        Kandinsky5Transformer3DModel,
        {
            "in_visual_dim": CHANNELS,
            "out_visual_dim": CHANNELS,
            "in_text_dim": TEXT_CHANNELS,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": HEADS * HEAD_DIM,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 3,
            "axes_dims": (8, 12, 12),
        },
    )(**changes)
    return with_open_gates(model)


def with_open_gates(model: nn.Module) -> nn.Module:
    """The model with random numbers for the modulation that is zero before training, and lets no attention through."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    frames, height, width = (size * patch for size, patch in zip(grid, model.config.patch_size))
    channels = 2 * CHANNELS + 1 if model.config.visual_cond else CHANNELS
    return {
        "hidden_states": random(batch, frames, height, width, channels),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 500.0),
        "pooled_projections": random(batch, 8),
        "visual_rope_pos": tuple(torch.arange(size) for size in grid),
        "text_rope_pos": torch.arange(TEXT_TOKENS),
    }


KANDINSKY5 = TinyModel(
    make,
    call,
    layers=tuple(f"visual_transformer_blocks.{i}.self_attention" for i in range(3)),
    latent_axes="bfhwc",
    in_float64=False,
    variants={"image to video": Variant({"visual_cond": True})},
)

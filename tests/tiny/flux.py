"""A tiny FLUX.1."""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, Variant, seeded
from torch import Tensor, nn


def make(**changes: Any) -> nn.Module:
    return seeded(
        FluxTransformer2DModel,
        {
            "in_channels": CHANNELS,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": HEADS,
            "joint_attention_dim": TEXT_CHANNELS,
            "pooled_projection_dim": 8,
            "axes_dims_rope": (8, 12, 12),
        },
        changes,
    )


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    frames, height, width = grid
    return {
        "hidden_states": random(batch, frames * height * width, model.config.in_channels),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "pooled_projections": random(batch, 8),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": image_ids(height, width),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }


def image_ids(height: int, width: int, image: int = 0) -> Tensor:
    """Flux's position ids [height * width, 3] of one image."""
    return torch.cartesian_prod(torch.tensor([image]), torch.arange(height), torch.arange(width)).float()


def kontext(call: dict[str, Any]) -> dict[str, Any]:
    references = torch.cat([image_ids(4, 3, image=1), image_ids(2, 2, image=1)])
    return {
        "hidden_states": torch.cat([call["hidden_states"], torch.randn(2, 16, CHANNELS)], dim=1),
        "img_ids": torch.cat([call["img_ids"], references]),
    }


FLUX = TinyModel(
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
    compiled=True,
    variants={"kontext": Variant(call=kontext, text_after=4 * 3 + 2 * 2)},
)

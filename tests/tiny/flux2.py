"""A tiny FLUX.2."""

from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from tiny.flux import image_ids
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, Variant, seeded

make = seeded(
    Flux2Transformer2DModel,
    {
        "in_channels": CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT_CHANNELS,
        "timestep_guidance_channels": 8,
        "axes_dims_rope": (8, 8, 8, 8),
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    frames, height, width = grid
    return {
        "hidden_states": random(batch, frames * height * width, model.config.in_channels),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 4.0),
        "img_ids": four_ids(image_ids(height, width)).expand(batch, -1, -1),
        "txt_ids": torch.zeros(batch, TEXT_TOKENS, 4),
    }


def four_ids(ids: torch.Tensor) -> torch.Tensor:
    """The last of FLUX.2's four ids counts text tokens: it is 0 for images."""
    return torch.nn.functional.pad(ids, (0, 1))


def references(call: dict[str, Any]) -> dict[str, Any]:
    latents, ids = call["hidden_states"], call["img_ids"]
    reference = four_ids(image_ids(4, 3, image=10)).expand(len(ids), -1, -1)
    return {
        "hidden_states": torch.cat([latents, Random(1)(len(latents), 4 * 3, CHANNELS)], dim=1),
        "img_ids": torch.cat([ids, reference], dim=1),
    }


FLUX2 = TinyModel(
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
    variants={"references": Variant(call=references, text_after=4 * 3)},
)

"""A tiny EasyAnimate, with both kinds of its blocks."""

from typing import Any

import torch
from diffusers import EasyAnimateTransformer3DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, Variant, seeded

make = seeded(
    EasyAnimateTransformer3DModel,
    {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 3,
        "mmdit_layers": 2,
        "patch_size": 2,
        "time_embed_dim": 8,
        "text_embed_dim": TEXT_CHANNELS,
        "sample_width": 10,
        "sample_height": 14,
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    frames, height, width = grid
    patch = model.config.patch_size
    return {
        "hidden_states": random(batch, CHANNELS, frames, height * patch, width * patch),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
    }


def two_encoders(call: dict[str, Any]) -> dict[str, Any]:
    return {"encoder_hidden_states_t5": torch.ones(2, 5, TEXT_CHANNELS)}


def inpainting(call: dict[str, Any]) -> dict[str, Any]:
    return {"inpaint_latents": torch.ones_like(call["hidden_states"])}


EASYANIMATE = TinyModel(
    make,
    call,
    layers=tuple(f"transformer_blocks.{i}.attn1" for i in range(3)),
    text_before=TEXT_TOKENS,
    prompt=range(TEXT_TOKENS),
    variants={
        "two text encoders": Variant({"text_embed_dim_t5": TEXT_CHANNELS}, two_encoders, text_before=5),
        "inpainting": Variant({"in_channels": 2 * CHANNELS}, inpainting),
    },
)

"""A tiny FLUX.3."""

from typing import Any

import torch
from tiny.flux import image_ids
from tiny.flux2 import four_ids
from tiny.model import (
    CHANNELS,
    HEAD_DIM,
    HEADS,
    TEXT_CHANNELS,
    TEXT_TOKENS,
    Grid,
    Random,
    TinyModel,
    Variant,
    class_since,
    seeded,
)

make = seeded(
    class_since("0.42", "Flux3Transformer2DModel"),
    {
        "in_channels": CHANNELS,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT_CHANNELS,
        "cond_in_channels": CHANNELS,
        "timestep_channels": 8,
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
        "img_ids": four_ids(image_ids(height, width)),
        "txt_ids": torch.zeros(TEXT_TOKENS, 4),
    }


def references(call: dict[str, Any]) -> dict[str, Any]:
    return {
        "image_cond_hidden_states": Random(1)(len(call["hidden_states"]), 4 * 3, CHANNELS),
        "image_cond_ids": four_ids(image_ids(4, 3, image=10)),
    }


FLUX3 = TinyModel(
    make,
    call,
    layers=("mode_blocks.image.0.attn", *(f"single_transformer_blocks.{i}.attn" for i in range(2))),
    grid=(1, 7, 5),
    text_before=TEXT_TOKENS,
    prompt=range(TEXT_TOKENS),
    latent_axes="bsc",
    variants={"references": Variant(call=references, text_after=4 * 3)},
)

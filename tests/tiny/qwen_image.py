"""A tiny Qwen-Image."""

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, Variant, seeded

make = seeded(
    QwenImageTransformer2DModel,
    {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "patch_size": 1,
        "num_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT_CHANNELS,
        "axes_dims_rope": (8, 12, 12),
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    frames, height, width = grid
    return {
        "hidden_states": random(batch, frames * height * width, model.config.in_channels),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[grid]] * batch,
    }


def edit(call: dict[str, Any]) -> dict[str, Any]:
    """Two reference images after the image."""
    latents = call["hidden_states"]
    return {
        "hidden_states": torch.cat([latents, Random(1)(len(latents), 4 * 3 + 2 * 2, CHANNELS)], dim=1),
        "img_shapes": [[*row, (1, 4, 3), (1, 2, 2)] for row in call["img_shapes"]],
    }


def one_shape_a_row(call: dict[str, Any]) -> dict[str, Any]:
    return {"img_shapes": [row[0] for row in call["img_shapes"]]}


def one_shape(call: dict[str, Any]) -> dict[str, Any]:
    return {"img_shapes": call["img_shapes"][0][0]}


QWEN_IMAGE = TinyModel(
    make,
    call,
    layers=tuple(f"transformer_blocks.{i}.attn" for i in range(2)),
    grid=(1, 7, 5),
    text_before=TEXT_TOKENS,
    prompt=range(TEXT_TOKENS),
    latent_axes="bsc",
    variants={
        "one shape a row": Variant(call=one_shape_a_row),
        "one shape": Variant(call=one_shape),
        "edit": Variant(call=edit, text_after=4 * 3 + 2 * 2),
        "edit with a time of its own": Variant({"zero_cond_t": True}, edit, text_after=4 * 3 + 2 * 2),
    },
)

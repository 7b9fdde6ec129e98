"""A tiny HunyuanImage."""

from typing import Any

import torch
from diffusers import HunyuanImageTransformer2DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, Variant, seeded

make = seeded(
    HunyuanImageTransformer2DModel,
    {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": (1, 1),
        "text_embed_dim": TEXT_CHANNELS,
        "rope_axes_dim": (16, 16),
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Rows of the batch have 4, 3, 2, … text tokens that are not padding."""
    random = Random(seed)
    patch = model.config.patch_size
    sizes = (size * one for size, one in zip(grid[-len(patch) :], patch))
    lengths = torch.arange(4, 4 - batch, -1)
    return {
        "hidden_states": random(batch, CHANNELS, *sizes),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "encoder_attention_mask": (torch.arange(TEXT_TOKENS) < lengths[:, None]).long(),
    }


def glyphs(call: dict[str, Any]) -> dict[str, Any]:
    """Three tokens of the second text encoder, none of them padding."""
    batch = len(call["hidden_states"])
    return {
        "encoder_hidden_states_2": Random(1)(batch, 3, TEXT_CHANNELS),
        "encoder_attention_mask_2": torch.ones(batch, 3),
    }


HUNYUAN_IMAGE = TinyModel(
    make,
    call,
    layers=(
        *(f"transformer_blocks.{i}.attn" for i in range(2)),
        *(f"single_transformer_blocks.{i}.attn" for i in range(2)),
    ),
    grid=(1, 7, 5),
    text_after=TEXT_TOKENS,
    prompt=range(-TEXT_TOKENS, 0),
    text_lengths=(4, 3),
    latent_axes="bchw",
    variants={
        "other patches": Variant({"patch_size": (2, 2)}),
        "glyphs": Variant({"text_embed_2_dim": TEXT_CHANNELS}, glyphs, text_after=3),
    },
)

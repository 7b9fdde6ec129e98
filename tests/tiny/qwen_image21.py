"""A tiny Qwen-Image 2.1."""

from typing import Any

import torch
from diffusers import QwenImage21Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, seeded

make = seeded(
    QwenImage21Transformer2DModel,
    {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "context_in_dim": TEXT_CHANNELS,
        "axes_dims_rope": (8, 12, 12),
    },
)


def first_call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """That of the first step, which computes the keys of the text."""
    random = Random(seed)
    tokens = grid[1] * grid[2]
    is_image = torch.arange(TEXT_TOKENS + tokens // 4) >= TEXT_TOKENS
    return {
        "hidden_states": random(batch, tokens, CHANNELS),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[grid]] * batch,
        "img_mask": is_image.expand(batch, -1),
    }


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """That of a later step, whose queries are the image's alone."""
    arguments = first_call(model, grid, batch, seed)
    cache = QwenImage21KVCache(len(model.transformer_blocks))
    with torch.no_grad():
        model(**arguments, kv_cache=cache, kv_cache_mode="extract")
    return arguments | {"kv_cache": cache, "kv_cache_mode": "cached"}


QWEN_IMAGE_21 = TinyModel(
    make,
    call,
    layers=tuple(f"transformer_blocks.{i}.attn" for i in range(2)),
    # Four tokens are one slot of the text encoder.
    grid=(1, 6, 10),
    text_before=TEXT_TOKENS,
    grid_queries=True,
    text=None,
    latent_axes="bsc",
    in_float64=False,
)

"""Tiny PixArt, DiT and Hunyuan-DiT."""

from typing import Any

import torch
from diffusers import DiTTransformer2DModel, HunyuanDiT2DModel, PixArtTransformer2DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, seeded

CONFIG = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": CHANNELS,
    "num_layers": 2,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
}

make_pixart = seeded(PixArtTransformer2DModel, CONFIG | {"cross_attention_dim": HEADS * HEAD_DIM})
make_dit = seeded(DiTTransformer2DModel, CONFIG | {"num_embeds_ada_norm": 10})

make_hunyuan_dit = seeded(
    HunyuanDiT2DModel,
    CONFIG
    | {
        "hidden_size": HEADS * HEAD_DIM,
        "cross_attention_dim": TEXT_CHANNELS,
        "cross_attention_dim_t5": TEXT_CHANNELS,
        "pooled_projection_dim": 8,
        "text_len": TEXT_TOKENS,
        "text_len_t5": TEXT_TOKENS,
        "use_style_cond_and_image_meta_size": False,
    },
)


def pixart_call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    return {
        "hidden_states": _latents(random, grid, batch),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, HEADS * HEAD_DIM),
        "timestep": torch.full((batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def dit_call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": _latents(Random(seed), grid, batch),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.full((batch,), 1),
    }


def hunyuan_dit_call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    return {
        "hidden_states": _latents(random, grid, batch),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "text_embedding_mask": torch.ones(batch, TEXT_TOKENS),
        "encoder_hidden_states_t5": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "text_embedding_mask_t5": torch.ones(batch, TEXT_TOKENS),
    }


def _latents(random: Random, grid: Grid, batch: int) -> torch.Tensor:
    _, height, width = grid
    return random(batch, CHANNELS, 2 * height, 2 * width)


PIXART = TinyModel(
    make_pixart,
    pixart_call,
    layers=tuple(f"transformer_blocks.{i}.attn1" for i in range(2)),
    grid=(1, 7, 5),
    latent_axes="bchw",
)
DIT = TinyModel(
    make_dit,
    dit_call,
    layers=tuple(f"transformer_blocks.{i}.attn1" for i in range(2)),
    grid=(1, 6, 6),
    square=True,
    text=None,
    latent_axes="bchw",
)
HUNYUAN_DIT = TinyModel(
    make_hunyuan_dit,
    hunyuan_dit_call,
    layers=tuple(f"blocks.{i}.attn1" for i in range(2)),
    grid=(1, 7, 5),
    latent_axes="bchw",
)

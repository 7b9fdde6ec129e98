"""A tiny HunyuanVideo."""

from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, Variant, seeded

CONFIG = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": TEXT_CHANNELS,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (8, 12, 12),
}

make = seeded(HunyuanVideoTransformer3DModel, CONFIG)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Rows of the batch have 4, 3, 2, … text tokens that are not padding."""
    random = Random(seed)
    frames, height, width = grid
    patch = model.config.patch_size
    lengths = torch.arange(4, 4 - batch, -1)
    call = {
        "hidden_states": random(
            batch, model.config.in_channels, frames * model.config.patch_size_t, height * patch, width * patch
        ),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "encoder_attention_mask": (torch.arange(TEXT_TOKENS) < lengths[:, None]).long(),
        "pooled_projections": random(batch, 8),
    }
    return call | ({"guidance": torch.full((batch,), 6000.0)} if model.config.guidance_embeds else {})


HUNYUAN_VIDEO = TinyModel(
    make,
    call,
    layers=(
        *(f"transformer_blocks.{i}.attn" for i in range(2)),
        *(f"single_transformer_blocks.{i}.attn" for i in range(2)),
    ),
    text_after=TEXT_TOKENS,
    prompt=range(-TEXT_TOKENS, 0),
    text_lengths=(4, 3),
    drops_unfilled_patches=True,
    compiled=True,
    variants={
        "no guidance": Variant({"guidance_embeds": False}),
        "latent_concat": Variant({"image_condition_type": "latent_concat", "in_channels": 9}),
        "token_replace": Variant({"image_condition_type": "token_replace"}),
        "patches in time": Variant({"patch_size_t": 2}),
    },
)

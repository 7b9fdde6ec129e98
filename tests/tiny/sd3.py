"""A tiny Stable Diffusion 3.5."""

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, Variant, seeded

make = seeded(
    SD3Transformer2DModel,
    {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 3,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT_CHANNELS,
        "caption_projection_dim": HEADS * HEAD_DIM,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    _, height, width = grid
    patch = model.config.patch_size
    return {
        "hidden_states": random(batch, CHANNELS, height * patch, width * patch),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "pooled_projections": random(batch, 8),
        "timestep": torch.full((batch,), 500),
    }


SD3 = TinyModel(
    make,
    call,
    layers=(
        "transformer_blocks.0.attn",
        "transformer_blocks.0.attn2",
        "transformer_blocks.1.attn",
        "transformer_blocks.2.attn",
    ),
    grid=(1, 7, 5),
    text_after=TEXT_TOKENS,
    prompt=range(-TEXT_TOKENS, 0),
    latent_axes="bchw",
    variants={"other patches": Variant({"patch_size": 1})},
)

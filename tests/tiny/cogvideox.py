"""A tiny CogVideoX."""

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, Variant, seeded

CONFIG = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "time_embed_dim": 8,
    "text_embed_dim": TEXT_CHANNELS,
    "num_layers": 3,
    "sample_width": 10,
    "sample_height": 14,
    "sample_frames": 9,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": TEXT_TOKENS,
}

make = seeded(CogVideoXTransformer3DModel, CONFIG)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    frames, height, width = grid
    patch, patch_t = model.config.patch_size, model.config.get("patch_size_t") or 1
    return {
        "hidden_states": random(batch, frames * patch_t, model.config.in_channels, height * patch, width * patch),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
    }


COGVIDEOX = TinyModel(
    make,
    call,
    layers=tuple(f"transformer_blocks.{i}.attn1" for i in range(3)),
    text_before=TEXT_TOKENS,
    prompt=range(TEXT_TOKENS),
    latent_axes="bfchw",
    drops_unfilled_patches=True,
    compiled=True,
    variants={
        "1.5": Variant({"patch_size_t": 2, "patch_bias": False, "use_rotary_positional_embeddings": True}),
        "image to video": Variant({"in_channels": 8}),
    },
)

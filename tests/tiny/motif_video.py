"""A tiny Motif-Video."""

from typing import Any

import torch
from diffusers import MotifVideoTransformer3DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, Variant, seeded

make = seeded(
    MotifVideoTransformer3DModel,
    {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 2,
        "num_single_layers": 2,
        "text_embed_dim": TEXT_CHANNELS,
        "rope_axes_dim": (8, 12, 12),
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Rows of the batch have 4, 3, 2, … text tokens that are not padding."""
    random = Random(seed)
    frames, height, width = grid
    patch, patch_t = model.config.patch_size, model.config.patch_size_t
    lengths = torch.arange(4, 4 - batch, -1)
    return {
        "hidden_states": random(batch, CHANNELS, frames * patch_t, height * patch, width * patch),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "encoder_attention_mask": (torch.arange(TEXT_TOKENS) < lengths[:, None]).long(),
    }


def image(call: dict[str, Any]) -> dict[str, Any]:
    return {"image_embeds": torch.ones(2, 3, 8)}


MOTIF_VIDEO = TinyModel(
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
    in_float64=False,
    variants={
        "image to video": Variant({"image_embed_dim": 8}, image, text_after=3),
        "text by cross-attention": Variant(
            {"enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True}
        ),
        "decoder": Variant({"num_decoder_layers": 1}, ends=(TEXT_TOKENS, 3 * 7 * 5)),
    },
)

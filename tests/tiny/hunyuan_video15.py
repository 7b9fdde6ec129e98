"""A tiny HunyuanVideo 1.5."""

from typing import Any

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, Variant, seeded

IMAGE_TOKENS, GLYPH_TOKENS = 3, 5

make = seeded(
    HunyuanVideo15Transformer3DModel,
    {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 3,
        "num_refiner_layers": 1,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": TEXT_CHANNELS,
        "text_embed_2_dim": 8,
        "image_embed_dim": 8,
        "rope_axes_dim": (8, 12, 12),
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Text to video: no image token counts. Rows have 4, 3, 2, … tokens of the prompt and two of its glyphs."""
    random = Random(seed)
    frames, height, width = grid
    patch, patch_t = model.config.patch_size, model.config.patch_size_t
    lengths = torch.arange(4, 4 - batch, -1)
    return {
        "hidden_states": random(batch, model.config.in_channels, frames * patch_t, height * patch, width * patch),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "encoder_attention_mask": (torch.arange(TEXT_TOKENS) < lengths[:, None]).long(),
        "encoder_hidden_states_2": random(batch, GLYPH_TOKENS, 8),
        "encoder_attention_mask_2": (torch.arange(GLYPH_TOKENS) < 2).long().expand(batch, -1),
        "image_embeds": torch.zeros(batch, IMAGE_TOKENS, 8),
    }


def image_to_video(call: dict[str, Any]) -> dict[str, Any]:
    return {"image_embeds": torch.ones(2, IMAGE_TOKENS, 8)}


HUNYUAN_VIDEO_15 = TinyModel(
    make,
    call,
    layers=tuple(f"transformer_blocks.{i}.attn" for i in range(3)),
    text_after=IMAGE_TOKENS + GLYPH_TOKENS + TEXT_TOKENS,
    prompt=range(105 + 2, 105 + 2 + 4),
    text_lengths=(2 + 4, 2 + 3),
    compiled=True,
    variants={
        "image to video": Variant(call=image_to_video, prompt=range(105 + 5, 105 + 5 + 4)),
        "patches": Variant({"patch_size": 2, "patch_size_t": 3}),
    },
)

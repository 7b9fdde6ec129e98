"""A tiny HunyuanVideo Framepack."""

from typing import Any

import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from tiny import hunyuan_video
from tiny.model import CHANNELS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, Variant, seeded

IMAGE_TOKENS = 3
CLEAN, TWICE, FOUR_TIMES = 2 * 7 * 5, 1 * 4 * 3, 1 * 2 * 2
"""Tokens of the history in the call below, whose frames have 7 x 5 tokens."""

CONFIG = hunyuan_video.CONFIG | {"has_image_proj": True, "image_proj_dim": TEXT_CHANNELS, "has_clean_x_embedder": True}
make = seeded(HunyuanVideoFramepackTransformer3DModel, CONFIG)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Four frames at a fourth of the size, two at half, two whole ones; then the video's."""
    call, random = hunyuan_video.call(model, grid, batch, seed), Random(seed + 1)
    size = call["hidden_states"].shape[3:]
    return call | {
        "image_embeds": random(batch, IMAGE_TOKENS, TEXT_CHANNELS),
        "indices_latents": torch.arange(8, 8 + grid[0]),
        "latents_history_4x": random(batch, CHANNELS, 4, *size),
        "indices_latents_history_4x": torch.arange(4),
        "latents_history_2x": random(batch, CHANNELS, 2, *size),
        "indices_latents_history_2x": torch.arange(4, 6),
        "latents_clean": random(batch, CHANNELS, 2, *size),
        "indices_latents_clean": torch.arange(6, 8),
    }


FRAMEPACK = TinyModel(
    make,
    call,
    layers=hunyuan_video.HUNYUAN_VIDEO.layers,
    text_before=FOUR_TIMES + TWICE + CLEAN,
    text_after=IMAGE_TOKENS + TEXT_TOKENS,
    prompt=range(-TEXT_TOKENS, 0),
    text_lengths=(IMAGE_TOKENS + 4, IMAGE_TOKENS + 3),
    variants={
        "one clean frame": Variant(
            call=lambda call: {
                "latents_clean": call["latents_clean"][:, :, :1],
                "indices_latents_clean": call["indices_latents_clean"][:1],
            },
            text_before=-7 * 5,
        )
    },
)

"""A tiny LTX-2: video, and audio beside it."""

from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, Variant, seeded

AUDIO_TOKENS, KEYFRAME_TOKENS = 11, 7 * 5

make = seeded(
    LTX2VideoTransformer3DModel,
    {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "cross_attention_dim": HEADS * HEAD_DIM,
        "audio_in_channels": CHANNELS,
        "audio_out_channels": CHANNELS,
        "audio_num_attention_heads": HEADS,
        "audio_attention_head_dim": 16,
        "audio_cross_attention_dim": HEADS * 16,
        "num_layers": 3,
        "caption_channels": TEXT_CHANNELS,
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    frames, height, width = grid
    coords = model.rope.prepare_video_coords(batch, frames, height, width, torch.device("cpu"), fps=24.0)
    return {
        "hidden_states": random(batch, frames * height * width, model.config.in_channels),
        "audio_hidden_states": random(batch, AUDIO_TOKENS, model.config.audio_in_channels),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "audio_encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 500),
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": AUDIO_TOKENS,
        # Pipelines pass the coordinates beside the sizes.
        "video_coords": coords,
    }


def keyframe(call: dict[str, Any]) -> dict[str, Any]:
    """One more frame at the end, at the place of the first."""
    latents, coords = call["hidden_states"], call["video_coords"]
    return {
        "hidden_states": torch.cat([latents, torch.ones_like(latents[:, :KEYFRAME_TOKENS])], dim=1),
        "video_coords": torch.cat([coords, coords[:, :, :KEYFRAME_TOKENS]], dim=2),
    }


LTX2 = TinyModel(
    make,
    call,
    layers=tuple(f"transformer_blocks.{i}.attn1" for i in range(3)),
    latent_axes="bsc",
    variants={
        "keyframe": Variant(call=keyframe, text_after=KEYFRAME_TOKENS),
        "2.3": Variant({"gated_attn": True, "audio_gated_attn": True, "perturbed_attn": True}),
    },
)

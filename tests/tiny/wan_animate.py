"""A tiny Wan-Animate: a reference frame before the video's, poses added to the others, faces by cross-attention."""

from typing import Any

from diffusers import WanAnimateTransformer3DModel
from tiny import wan
from tiny.model import CHANNELS, Grid, Random, TinyModel, seeded

FACE_SIZE = 16

CONFIG = wan.CONFIG | {
    "in_channels": 2 * CHANNELS + 4,
    "latent_channels": CHANNELS,
    "image_dim": None,
    "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
    "motion_encoder_size": FACE_SIZE,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 3,
}

make = seeded(WanAnimateTransformer3DModel, CONFIG)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    call, random = wan.call(model, grid, batch, seed), Random(seed + 1)
    frames, height, width = call["hidden_states"].shape[2:]
    return call | {
        "pose_hidden_states": random(batch, CHANNELS, frames - 1, height, width),
        # Four pictures to a latent frame, but one to the first.
        "face_pixel_values": random(batch, 3, 4 * (frames - 1) - 3, FACE_SIZE, FACE_SIZE),
    }


WAN_ANIMATE = TinyModel(
    make,
    call,
    layers=tuple(f"blocks.{i}.attn1" for i in range(3)),
    positional=("hidden_states", "timestep"),
)

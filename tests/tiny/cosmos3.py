"""A tiny Cosmos 3."""

from typing import Any

import torch
from diffusers import Cosmos3OmniTransformer
from tiny.model import CHANNELS, HEAD_DIM, TEXT_TOKENS, Grid, Random, TinyModel, seeded

make = seeded(
    Cosmos3OmniTransformer,
    {
        "head_dim": HEAD_DIM,
        "hidden_size": 32,
        "intermediate_size": 32,
        "latent_channel": CHANNELS,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "patch_latent_dim": 4 * CHANNELS,
        "sound_dim": 8,
        "sound_gen": True,
        "vocab_size": 20,
        "rope_axes_dim": (6, 5, 5),
    },
)


def call(
    model: Any, grid: Grid, batch: int = 1, seed: int = 0, num_sound: int = 0, num_text: int = TEXT_TOKENS
) -> dict[str, Any]:
    """There is no batch: all is packed into one sequence, `[text | video | sound]`."""
    random = Random(seed)
    frames, height, width = grid
    tokens = frames * height * width
    places = torch.cat([torch.arange(num_text)[None].expand(3, -1), 100 + torch.ones(grid).nonzero().T], dim=1)
    video = torch.arange(num_text, num_text + tokens)
    arguments = {
        "input_ids": torch.arange(num_text) % 20,
        "text_indexes": torch.arange(num_text),
        "position_ids": torch.cat([places, 100 + torch.arange(num_sound)[None].expand(3, -1)], dim=1),
        "und_len": num_text,
        "sequence_length": num_text + tokens + num_sound,
        "vision_tokens": random(1, CHANNELS, frames, 2 * height, 2 * width),
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": torch.full((tokens,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(frames)],
    }
    if num_sound:
        sound = torch.arange(num_sound) + num_text + tokens
        arguments |= {
            "sound_tokens": [random(8, num_sound)],
            "sound_token_shapes": [(num_sound, 1, 1)],
            "sound_sequence_indexes": sound,
            "sound_mse_loss_indexes": sound,
            "sound_timesteps": torch.full((num_sound,), 500.0),
            "sound_noisy_frame_indexes": [torch.arange(num_sound)],
        }
    return arguments


COSMOS3 = TinyModel(
    make,
    call,
    layers=tuple(f"layers.{i}.self_attn" for i in range(2)),
    text_before=TEXT_TOKENS,
    grid_queries=True,
    latents="vision_tokens",
    text=None,
    positional=("input_ids", "text_indexes"),
)

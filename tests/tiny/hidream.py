"""A tiny HiDream-I1."""

from typing import Any

import torch
from diffusers import HiDreamImageTransformer2DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, seeded

make = seeded(
    HiDreamImageTransformer2DModel,
    {
        "patch_size": 2,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "caption_channels": [TEXT_CHANNELS, TEXT_CHANNELS],
        "text_emb_dim": 8,
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "axes_dims_rope": (8, 12, 12),
        "max_resolution": (24, 24),
        "llama_layers": [0, 1, 1],
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    _, height, width = grid
    return {
        "hidden_states": random(batch, CHANNELS, 2 * height, 2 * width),
        "timesteps": torch.full((batch,), 500),
        "encoder_hidden_states_t5": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "encoder_hidden_states_llama3": random(2, batch, 3, TEXT_CHANNELS),
        "pooled_embeds": random(batch, 8),
    }


# The image is not square, so that the model pads it to 12 x 12 tokens. T5's text stands before Llama's.
HIDREAM = TinyModel(
    make,
    call,
    layers=("double_stream_blocks.0.block.attn1", *(f"single_stream_blocks.{i}.block.attn1" for i in range(2))),
    grid=(1, 11, 9),
    text_after=12 * 12 - 11 * 9 + TEXT_TOKENS + 2 * 3,
    prompt=range(-TEXT_TOKENS - 2 * 3, -2 * 3),
    text="encoder_hidden_states_t5",
    latent_axes="bchw",
)

"""A tiny Mochi."""

from typing import Any

import torch
from diffusers import MochiTransformer3DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, seeded

make = seeded(
    MochiTransformer3DModel,
    {
        "patch_size": 2,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 3,
        "pooled_projection_dim": 16,
        "in_channels": CHANNELS,
        "text_embed_dim": TEXT_CHANNELS,
        "time_embed_dim": 8,
        "max_sequence_length": TEXT_TOKENS,
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Rows of the batch have 4, 3, 2, … text tokens that are not padding."""
    random = Random(seed)
    frames, height, width = grid
    patch = model.config.patch_size
    lengths = torch.arange(4, 4 - batch, -1)
    return {
        "hidden_states": random(batch, model.config.in_channels, frames, height * patch, width * patch),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": torch.arange(TEXT_TOKENS) < lengths[:, None],
    }


MOCHI = TinyModel(
    make,
    call,
    layers=tuple(f"transformer_blocks.{i}.attn1" for i in range(3)),
    text_after=None,
    # The prompt's mean goes into the modulation of every token.
    prompt=range(3 * 7 * 5 + 4),
    text_lengths=(4, 3),
    row_by_row=True,
)

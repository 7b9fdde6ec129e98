"""A tiny Ideogram 4."""

from typing import Any

import torch
from diffusers import Ideogram4Transformer2DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, seeded

make = seeded(
    Ideogram4Transformer2DModel,
    {
        "in_channels": CHANNELS,
        "num_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "intermediate_size": 32,
        "adaln_dim": 16,
        "llm_features_dim": TEXT_CHANNELS,
        "mrope_section": (6, 5, 5),
    },
)
TEXT, IMAGE = 3, 2


def call_with_text(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Text and image are packed: latents of text, and text of the image, mean nothing."""
    random = Random(seed)
    _, height, width = grid
    text = torch.arange(TEXT_TOKENS)[:, None].expand(-1, 3)
    image = 65536 + torch.cartesian_prod(torch.tensor([0]), torch.arange(height), torch.arange(width))
    tokens = TEXT_TOKENS + len(image)
    is_image = torch.arange(tokens) >= TEXT_TOKENS
    return {
        "hidden_states": random(batch, tokens, CHANNELS),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": random(batch, tokens, TEXT_CHANNELS),
        "position_ids": torch.cat([text, image]).expand(batch, -1, -1).contiguous(),
        "segment_ids": torch.ones(batch, tokens, dtype=torch.long),
        "indicator": torch.where(is_image, IMAGE, TEXT).expand(batch, -1).contiguous(),
    }


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """As the model without a prompt is called."""
    packed = call_with_text(model, grid, batch, seed)
    return packed | {name: x[:, TEXT_TOKENS:].contiguous() for name, x in packed.items() if x.ndim > 1}


IDEOGRAM4 = TinyModel(
    make,
    call,
    layers=tuple(f"layers.{i}.attention" for i in range(2)),
    grid=(1, 7, 5),
    text=None,
    latent_axes="bsc",
)

"""Tiny CogView 3+ and 4, and GLM-Image."""

from typing import Any

import torch
from diffusers import CogView3PlusTransformer2DModel, CogView4Transformer2DModel, GlmImageTransformer2DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, seeded

CONFIG = {
    "patch_size": 2,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 2,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "text_embed_dim": TEXT_CHANNELS,
    "time_embed_dim": 8,
    "condition_dim": 4,
}

make_cogview3 = seeded(CogView3PlusTransformer2DModel, CONFIG | {"pos_embed_max_size": 16})
make_cogview4 = seeded(CogView4Transformer2DModel, CONFIG | {"rope_axes_dim": (16, 16)})
make_glm_image = seeded(GlmImageTransformer2DModel, CONFIG | {"prior_vq_quantizer_codebook_size": 16})


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    _, height, width = grid
    size = torch.tensor([[64, 64]]).expand(batch, 2)
    return {
        "hidden_states": random(batch, CHANNELS, 2 * height, 2 * width),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 500),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros_like(size),
    }


def glm_image_call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    arguments = call(model, grid, batch, seed)
    del arguments["original_size"]
    _, height, width = grid
    return arguments | {
        "prior_token_id": torch.arange(height * width).remainder(16).expand(batch, -1),
        "prior_token_drop": torch.zeros(batch, height * width, dtype=torch.bool),
    }


def _tiny(make: Any, call: Any) -> TinyModel:
    return TinyModel(
        make,
        call,
        layers=tuple(f"transformer_blocks.{i}.attn1" for i in range(2)),
        grid=(1, 7, 5),
        text_before=TEXT_TOKENS,
        prompt=range(TEXT_TOKENS),
        latent_axes="bchw",
    )


COGVIEW3 = _tiny(make_cogview3, call)
COGVIEW4 = _tiny(make_cogview4, call)
GLM_IMAGE = _tiny(make_glm_image, glm_image_call)

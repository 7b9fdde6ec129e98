"""Tiny JoyImage Edit and Edit Plus."""

from typing import Any

import torch
from diffusers import JoyImageEditPlusTransformer3DModel, JoyImageEditTransformer3DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, Variant, seeded

CONFIG = {
    "patch_size": [1, 2, 2],
    "in_channels": CHANNELS,
    "hidden_size": HEADS * HEAD_DIM,
    "num_attention_heads": HEADS,
    "text_dim": TEXT_CHANNELS,
    "num_layers": 2,
    "rope_dim_list": [8, 12, 12],
}

make_edit = seeded(JoyImageEditTransformer3DModel, CONFIG)
make_edit_plus = seeded(JoyImageEditPlusTransformer3DModel, CONFIG)


def edit_call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    frames, height, width = grid
    return {
        "hidden_states": random(batch, CHANNELS, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
    }


def edit_plus_call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """One reference image of 4 x 3 tokens after the image, and two patches of padding."""
    random = Random(seed)
    frames, height, width = grid
    return {
        "hidden_states": random(batch, frames * height * width + 4 * 3 + 2, CHANNELS, 1, 2, 2),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "shape_list": [[grid, (1, 4, 3)]] * batch,
    }


LAYERS = tuple(f"double_blocks.{i}.attn" for i in range(2))

JOYIMAGE_EDIT = TinyModel(
    make_edit,
    edit_call,
    layers=LAYERS,
    grid=(2, 7, 5),
    text_after=TEXT_TOKENS,
    prompt=range(-TEXT_TOKENS, 0),
    variants={"mrope": Variant({"rope_type": "mrope"})},
)
JOYIMAGE_EDIT_PLUS = TinyModel(
    make_edit_plus,
    edit_plus_call,
    layers=LAYERS,
    grid=(1, 7, 5),
    text_after=4 * 3 + 2 + TEXT_TOKENS,
    prompt=range(-TEXT_TOKENS, 0),
    latent_axes="bsc",
)

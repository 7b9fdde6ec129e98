"""A tiny Bria Fibo 2."""

from typing import Any

import torch
from tiny.model import (
    CHANNELS,
    HEAD_DIM,
    HEADS,
    TEXT_CHANNELS,
    TEXT_TOKENS,
    Grid,
    Random,
    TinyModel,
    Variant,
    class_since,
    seeded,
)

SHORT_GIST, LONG_GIST = 4, 6

make = seeded(
    class_since("0.42", "BriaFibo2Transformer2DModel"),
    {
        "in_channels": CHANNELS,
        "patch_size": 2,
        "dim": HEADS * HEAD_DIM,
        "n_layers": 2,
        "n_refiner_layers": 0,
        "n_heads": HEADS,
        "cap_feat_dim": TEXT_CHANNELS,
        "injection_layer_ids": (1,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": SHORT_GIST,
        "max_num_gist_tokens": 8,
        "gist_step": 2,
        "gist_min_text_len": 4,
        "gist_max_text_len": 12,
        "axes_dims": (8, 12, 12),
        "axes_lens": (64, 32, 32),
    },
)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    _, height, width = grid
    return {
        "hidden_states": random(batch, CHANNELS, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 0.5),
        # A bundle for the gist and one for the layer that reads the text itself.
        "encoder_hidden_states": random(batch, 2, TEXT_TOKENS, TEXT_CHANNELS),
    }


def images_to_edit(call: dict[str, Any]) -> dict[str, Any]:
    batch = len(call["hidden_states"])
    return {"context_latents": [Random(1)(batch, CHANNELS, 8, 6), Random(2)(batch, CHANNELS, 4, 4)]}


def prompts_of_different_length(call: dict[str, Any]) -> dict[str, Any]:
    """Gists of six and four tokens, which stand after the image then."""
    lengths = torch.tensor([TEXT_TOKENS, 4])
    return {"encoder_attention_mask": torch.arange(TEXT_TOKENS) < lengths[:, None]}


BRIA_FIBO2 = TinyModel(
    make,
    call,
    layers=tuple(f"layers.{i}.attention" for i in range(2)),
    grid=(1, 7, 5),
    text_before=LONG_GIST,
    prompt=range(LONG_GIST),
    latent_axes="bchw",
    variants={
        "images to edit": Variant(call=images_to_edit, text_after=4 * 3 + 2 * 2),
        "prompts of different length": Variant(
            call=prompts_of_different_length,
            text_before=-LONG_GIST,
            text_after=LONG_GIST,
            prompt=range(-LONG_GIST, 0),
        ),
    },
)

"""Tiny FLUX.1, and what is laid out like it: Bria, Fibo, Ovis-Image, LongCat-Image."""

from typing import Any

import torch
from diffusers import (
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    FluxTransformer2DModel,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
)
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, Variant, seeded
from torch import Tensor

CONFIG = {
    "in_channels": CHANNELS,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "joint_attention_dim": TEXT_CHANNELS,
    "axes_dims_rope": (8, 12, 12),
}

make = seeded(FluxTransformer2DModel, CONFIG | {"pooled_projection_dim": 8})
make_bria = seeded(BriaTransformer2DModel, CONFIG)
make_bria_fibo = seeded(BriaFiboTransformer2DModel, CONFIG | {"text_encoder_dim": TEXT_CHANNELS})
make_ovis_image = seeded(OvisImageTransformer2DModel, CONFIG | {"out_channels": CHANNELS})
make_longcat_image = seeded(LongCatImageTransformer2DModel, CONFIG | {"pooled_projection_dim": 8})


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    frames, height, width = grid
    return {
        "hidden_states": random(batch, frames * height * width, model.config.in_channels),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "pooled_projections": random(batch, 8),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": image_ids(height, width),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }


def packed_call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """As FLUX.1's, without the pooled prompt."""
    arguments = call(model, grid, batch, seed)
    del arguments["pooled_projections"]
    return arguments


def bria_fibo_call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed + 1)
    layers = [random(batch, TEXT_TOKENS, TEXT_CHANNELS) for _ in range(4)]
    return packed_call(model, grid, batch, seed) | {"text_encoder_layers": layers}


def image_ids(height: int, width: int, image: int = 0) -> Tensor:
    """Flux's position ids [height * width, 3] of one image."""
    return torch.cartesian_prod(torch.tensor([image]), torch.arange(height), torch.arange(width)).float()


def kontext(call: dict[str, Any]) -> dict[str, Any]:
    references = torch.cat([image_ids(4, 3, image=1), image_ids(2, 2, image=1)])
    return {
        "hidden_states": torch.cat([call["hidden_states"], torch.randn(2, 16, CHANNELS)], dim=1),
        "img_ids": torch.cat([call["img_ids"], references]),
    }


def _tiny(make: Any, call: Any, **more: Any) -> TinyModel:
    return TinyModel(
        make,
        call,
        layers=(
            *(f"transformer_blocks.{i}.attn" for i in range(2)),
            *(f"single_transformer_blocks.{i}.attn" for i in range(2)),
        ),
        grid=(1, 7, 5),
        text_before=TEXT_TOKENS,
        prompt=range(TEXT_TOKENS),
        latent_axes="bsc",
        **more,
    )


FLUX = _tiny(make, call, compiled=True, variants={"kontext": Variant(call=kontext, text_after=4 * 3 + 2 * 2)})
BRIA = _tiny(make_bria, packed_call)
BRIA_FIBO = _tiny(make_bria_fibo, bria_fibo_call)
OVIS_IMAGE = _tiny(make_ovis_image, packed_call)
LONGCAT_IMAGE = _tiny(make_longcat_image, packed_call)

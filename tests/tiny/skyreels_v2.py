"""A tiny SkyReels-V2."""

from typing import Any

import torch
from diffusers import SkyReelsV2Transformer3DModel
from tiny import wan
from tiny.model import TinyModel, Variant, seeded

make = seeded(SkyReelsV2Transformer3DModel, wan.CONFIG)


def diffusion_forcing(call: dict[str, Any]) -> dict[str, Any]:
    """A timestep for each frame."""
    return {"timestep": torch.full((2, 3), 500), "enable_diffusion_forcing": True}


SKYREELS_V2 = TinyModel(
    make,
    wan.call,
    layers=tuple(f"blocks.{i}.attn1" for i in range(3)),
    drops_unfilled_patches=True,
    positional=("hidden_states", "timestep"),
    variants={"diffusion forcing": Variant(call=diffusion_forcing)},
)

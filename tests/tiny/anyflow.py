"""A tiny AnyFlow."""

from typing import Any

import torch
from diffusers import AnyFlowTransformer3DModel
from tiny import wan
from tiny.model import Grid, TinyModel, seeded

make = seeded(AnyFlowTransformer3DModel, wan.CONFIG)


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    call = wan.call(model, grid, batch, seed)
    latents = call["hidden_states"].transpose(1, 2).contiguous()
    frames = latents.shape[1]
    return call | {
        "hidden_states": latents,
        "timestep": torch.full((batch, frames), 500),
        "r_timestep": torch.full((batch, frames), 400),
    }


ANYFLOW = TinyModel(
    make,
    call,
    layers=tuple(f"blocks.{i}.attn1" for i in range(3)),
    latent_axes="bfchw",
    positional=("hidden_states", "timestep"),
)

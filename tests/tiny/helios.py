"""A tiny Helios."""

from typing import Any

import torch
from diffusers import HeliosTransformer3DModel
from tiny import wan
from tiny.model import CHANNELS, Grid, Random, TinyModel, Variant, seeded

LONG, MID, SHORT = 1 * 2 * 2, 1 * 4 * 3, 2 * 7 * 5
"""Tokens of the history in the call below, whose frames have 7 x 5 tokens."""


CONFIG = {name: value for name, value in wan.CONFIG.items() if name != "rope_max_seq_len"}
make = seeded(HeliosTransformer3DModel, CONFIG | {"rope_dim": (12, 10, 10)})


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Four frames at a fourth of the size, two at half, two whole ones; then the video's."""
    call, random = wan.call(model, grid, batch, seed), Random(seed + 1)
    size = call["hidden_states"].shape[3:]
    return call | {
        "indices_hidden_states": torch.arange(8, 8 + grid[0]).expand(batch, -1),
        "latents_history_long": random(batch, CHANNELS, 4, *size),
        "indices_latents_history_long": torch.arange(4).expand(batch, -1),
        "latents_history_mid": random(batch, CHANNELS, 2, *size),
        "indices_latents_history_mid": torch.arange(4, 6).expand(batch, -1),
        "latents_history_short": random(batch, CHANNELS, 2, *size),
        "indices_latents_history_short": torch.arange(6, 8).expand(batch, -1),
    }


def no_history(call: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(name for name in call if "history" in name)


HELIOS = TinyModel(
    make,
    call,
    layers=tuple(f"blocks.{i}.attn1" for i in range(3)),
    text_before=LONG + MID + SHORT,
    positional=("hidden_states", "timestep"),
    variants={
        "no history": Variant(call=no_history, text_before=-LONG - MID - SHORT),
        "amplified history": Variant({"is_amplify_history": True}),
    },
)

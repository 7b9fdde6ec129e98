"""A tiny WanVACE: Wan with control blocks, which run before its own; reference frames stand before the video's."""

from typing import Any

from diffusers import WanVACETransformer3DModel
from tiny import wan
from tiny.model import Grid, Random, TinyModel, seeded

CONTROL_CHANNELS = 6

make = seeded(WanVACETransformer3DModel, wan.CONFIG | {"vace_layers": [0, 2], "vace_in_channels": CONTROL_CHANNELS})


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    call = wan.call(model, grid, batch, seed)
    sizes = call["hidden_states"].shape[2:]
    return call | {"control_hidden_states": Random(seed + 1)(batch, CONTROL_CHANNELS, *sizes)}


WAN_VACE = TinyModel(
    make,
    call,
    layers=(*(f"vace_blocks.{i}.attn1" for i in range(2)), *(f"blocks.{i}.attn1" for i in range(3))),
    positional=("hidden_states", "timestep"),
)

"""A tiny ChronoEdit."""

from diffusers import ChronoEditTransformer3DModel
from tiny import wan
from tiny.model import TinyModel, seeded

make = seeded(ChronoEditTransformer3DModel, wan.CONFIG)


CHRONOEDIT = TinyModel(
    make,
    wan.call,
    layers=tuple(f"blocks.{i}.attn1" for i in range(3)),
    drops_unfilled_patches=True,
    positional=("hidden_states", "timestep"),
)

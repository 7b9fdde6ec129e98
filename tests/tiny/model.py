"""What the tests have to know of a tiny transformer with random weights, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

HEADS, HEAD_DIM = 2, 32
CHANNELS = 4
TEXT_TOKENS, TEXT_CHANNELS = 7, 16

Grid = tuple[int, int, int]
"""Frames, height, width in tokens."""


@dataclass(frozen=True)
class Variant:
    """A checkpoint of the same class, or another way to call it.

    Attributes:
        config: config entries that differ from the tiny ones.
        call: named arguments of a call -> those that this variant changes or adds.
        text_before, text_after: tokens that it adds around the grid.
        prompt: as of the tiny model, where it is another.
        ends: how many tokens follow the grid in different layers, where that differs.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    call: Callable[[dict[str, Any]], dict[str, Any]] = lambda call: {}
    text_before: int = 0
    text_after: int = 0
    prompt: range | None = None
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class TinyModel:
    """How to make a transformer, and to call it; what is known of it, for the tests to hold the family to.

    Attributes:
        make: config entries that differ from the tiny ones -> the transformer, the same weights each time.
        call: transformer, grid, batch size, seed -> named arguments of its forward.
        layers: names of its self-attention modules, in the order they run.
        grid: an odd grid of a few dozen tokens.
        text_before, text_after: tokens around the grid in the sequence of self-attention; None where it is shorter
            than the call says, because padded text is left out.
        prompt: the tokens of it that another prompt changes; negative numbers count from its end.
        text_lengths: the tokens after the grid that are no padding, in each row of a batch of two; None where there
            is no padding.
        grid_queries: its queries are the tokens of the grid alone, its keys all.
        row_by_row: attention is called once for each row of the batch.
        latents, text: the arguments that hold the latents and the prompt; None for a model without a prompt.
        latent_axes: axes of the latents, of "bcfhw"; "bsc" for latents that the pipeline packs.
        square: its output can only be as high as wide.
        drops_unfilled_patches: latents that do not fill their last patches are allowed and lose them.
        positional: leading arguments that pipelines may pass by position.
        in_float64: it runs in float64.
        compiled: torch.compile is tried on it. One for each way to attention is enough, it takes seconds.
        variants: by name, what else the family's description has to be right for.
    """

    make: Callable[..., nn.Module]
    call: Callable[..., dict[str, Any]]
    layers: tuple[str, ...]
    grid: Grid = (3, 7, 5)
    text_before: int = 0
    text_after: int | None = 0
    prompt: range = range(0)
    text_lengths: tuple[int, ...] | None = None
    grid_queries: bool = False
    row_by_row: bool = False
    latents: str = "hidden_states"
    text: str | None = "encoder_hidden_states"
    latent_axes: str = "bcfhw"
    square: bool = False
    drops_unfilled_patches: bool = False
    positional: tuple[str, ...] = ("hidden_states",)
    in_float64: bool = True
    compiled: bool = False
    variants: Mapping[str, Variant] = field(default_factory=dict)

    @property
    def calls_per_layer(self) -> int:
        """Attention calls of each layer for a batch of two."""
        return 2 if self.row_by_row else 1


class Random:
    """Normal tensors of given sizes, one after the other from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=self.generator)


def seeded(cls: Callable[..., nn.Module], config: dict[str, Any]) -> Callable[..., nn.Module]:
    """What makes a model for inference, with the same random weights each time; it takes config entries that differ."""

    def make(**changes: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return cls(**config | changes).eval().requires_grad_(False)

    return make


def class_since(release: str, name: str) -> Callable[..., nn.Module]:
    """A class that diffusers has since a release; where an older one is installed, a test that calls it is skipped."""

    def make(**config: Any) -> nn.Module:
        if Version(diffusers.__version__) < Version(release):
            pytest.skip(f"diffusers {diffusers.__version__} is installed, {name} is in diffusers since {release}")
        return getattr(diffusers, name)(**config)

    return make

"""Allegro: video tokens only, the prompt enters by cross-attention; attention is called through torch directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid of the latents [B, C, frames, height, width], each frame cut into patches."""
    latents = call.get("hidden_states")
    if latents is None or latents.ndim != 5:
        return None
    frames, height, width = latents.shape[2:]
    patch = transformer.config.patch_size
    return Layout(frames, height // patch, width // patch)


ALLEGRO = Family(
    name="allegro",
    transformers=("AllegroTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    layout=layout,
)

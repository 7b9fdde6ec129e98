"""Mochi: video, then text without its padding, in one sequence; attention is called row by row of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid of the latents [B, C, frames, height, width], each frame cut into patches, then text.

    How much text there is differs from row to row, and stands in the values of a mask.
    """
    latents = call.get("hidden_states")
    if latents is None or latents.ndim != 5:
        return None
    frames, height, width = latents.shape[2:]
    patch = transformer.config.patch_size
    return Layout(frames, height // patch, width // patch, text_after=None)


MOCHI = Family(
    name="mochi",
    transformers=("MochiTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    layout=layout,
)

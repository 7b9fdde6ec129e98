"""PixArt and DiT: the image's tokens only; the prompt enters by cross-attention, a class by modulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid of the latents [B, C, height, width], cut into patches."""
    latents = call.get("hidden_states")
    if latents is None or latents.ndim != 4:
        return None
    height, width = latents.shape[2:]
    patch = transformer.config.patch_size
    return Layout(1, height // patch, width // patch)


PIXART = Family(
    name="pixart",
    transformers=("PixArtTransformer2DModel", "DiTTransformer2DModel"),
    layers=("transformer_blocks.*.attn1",),
    layout=layout,
)
HUNYUAN_DIT = Family(
    name="hunyuan_dit",
    transformers=("HunyuanDiT2DModel",),
    layers=("blocks.*.attn1",),
    layout=layout,
)

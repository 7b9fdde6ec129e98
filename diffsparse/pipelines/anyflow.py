"""AnyFlow: video tokens only, the prompt enters by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid of the latents [B, frames, C, height, width], cut into patches."""
    latents = call.get("hidden_states")
    if latents is None or latents.ndim != 5:
        return None
    frames, _, height, width = latents.shape[1:]
    sizes = zip((frames, height, width), transformer.config.patch_size)
    return Layout(*(size // patch for size, patch in sizes))


ANYFLOW = Family(
    name="anyflow",
    transformers=("AnyFlowTransformer3DModel",),
    layers=("blocks.*.attn1",),
    layout=layout,
)

"""Kandinsky 5: video tokens only, the prompt enters by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid of the latents [B, frames, height, width, C], cut into patches.

    Where the model is called with sparsity of its own, its tokens have another order; its block mask keeps it dense.
    """
    latents = call.get("hidden_states")
    if latents is None or latents.ndim != 5:
        return None
    sizes = zip(latents.shape[1:4], transformer.config.patch_size)
    return Layout(*(size // patch for size, patch in sizes))


KANDINSKY5 = Family(
    name="kandinsky5",
    transformers=("Kandinsky5Transformer3DModel",),
    layers=("visual_transformer_blocks.*.self_attention",),
    layout=layout,
)

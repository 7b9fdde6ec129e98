"""Helios: frames that exist already, then video; the prompt enters by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout
from diffsparse.pipelines.framepack import history_tokens


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The frames before at three scales, then the grid of the latents [B, C, frames, height, width] in patches."""
    latents = call.get("hidden_states")
    if latents is None or latents.ndim != 5:
        return None
    history = ((call.get(f"latents_history_{name}"), scale) for name, scale in (("short", 1), ("mid", 2), ("long", 4)))
    frames, height, width = (size // patch for size, patch in zip(latents.shape[2:], transformer.config.patch_size))
    num_before = sum(history_tokens(x, scale) for x, scale in history if x is not None)
    return Layout(frames, height, width, text_before=num_before)


HELIOS = Family(
    name="helios",
    transformers=("HeliosTransformer3DModel",),
    layers=("blocks.*.attn1",),
    layout=layout,
    text_apart=False,
)

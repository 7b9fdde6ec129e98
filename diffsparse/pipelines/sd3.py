"""Stable Diffusion 3 and 3.5: the image as one frame, then text; 3.5 also attends to the image alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid of the latents [B, C, height, width], cut into patches, then the text tokens."""
    latents, text = call.get("hidden_states"), call.get("encoder_hidden_states")
    if latents is None or latents.ndim != 4 or text is None:
        return None
    height, width = latents.shape[2:]
    patch = transformer.config.patch_size
    return Layout(1, height // patch, width // patch, text_after=text.shape[1])


SD3 = Family(
    name="sd3",
    transformers=("SD3Transformer2DModel",),
    layers=("transformer_blocks.*.attn|transformer_blocks.*.attn2",),
    layout=layout,
)

"""ERNIE-Image: the image as one frame, then padded text, in single-stream blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid of the latents [B, C, height, width], cut into patches, then the text tokens."""
    latents, text = call.get("hidden_states"), call.get("text_bth")
    if latents is None or latents.ndim != 4 or text is None:
        return None
    height, width = latents.shape[2:]
    patch = transformer.config.patch_size
    return Layout(1, height // patch, width // patch, text_after=text.shape[1])


ERNIE_IMAGE = Family(
    name="ernie_image",
    transformers=("ErnieImageTransformer2DModel",),
    layers=("layers.*.self_attention",),
    layout=layout,
    padding_mask=True,
)

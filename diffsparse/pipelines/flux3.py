"""FLUX.3: blocks that see the image alone, then text, image and references in one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines import flux
from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The text tokens, the grid of the position ids, then references."""
    image, references = flux.layout(transformer, call), call.get("image_cond_hidden_states")
    if image is None or references is None:
        return image
    return image._replace(text_after=image.text_after + references.shape[1])


FLUX3 = Family(
    name="flux3",
    transformers=("Flux3Transformer2DModel",),
    layers=("mode_blocks.image.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
)

"""CogView 3+ and 4, and GLM-Image: text, then the image as one frame, in one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The text tokens, then the grid of the latents [B, C, height, width], cut into patches.

    GLM-Image reads the keys of the images that it edits from a cache: those calls have more keys than queries and
    stay dense.
    """
    latents, text = call.get("hidden_states"), call.get("encoder_hidden_states")
    if latents is None or latents.ndim != 4 or text is None:
        return None
    height, width = latents.shape[2:]
    patch = transformer.config.patch_size
    return Layout(1, height // patch, width // patch, text_before=text.shape[1])


COGVIEW = Family(
    name="cogview",
    transformers=("CogView4Transformer2DModel", "CogView3PlusTransformer2DModel", "GlmImageTransformer2DModel"),
    layers=("transformer_blocks.*.attn1",),
    layout=layout,
)

"""PRX: text, then image; the image alone has queries, in single-stream blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The text tokens, then the grid of the latents [B, C, height, width], in patches, which alone are queries."""
    latents, text = call.get("hidden_states"), call.get("encoder_hidden_states")
    if latents is None or latents.ndim != 4 or text is None:
        return None
    height, width = (size // transformer.config.patch_size for size in latents.shape[2:])
    return Layout(1, height, width, text_before=text.shape[1])


PRX = Family(
    name="prx",
    transformers=("PRXTransformer2DModel",),
    layers=("blocks.*.attention",),
    layout=layout,
    padding_mask=True,
    text_mask="attention_mask",
)

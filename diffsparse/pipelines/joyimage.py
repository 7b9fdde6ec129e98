"""JoyImage Edit: images of one size as frames, or an image and its references; then text; double-stream blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid of the latents [B, (images,) C, frames, height, width], cut into patches; then the text."""
    latents, text = call.get("hidden_states"), call.get("encoder_hidden_states")
    if latents is None or latents.ndim not in (5, 6) or text is None:
        return None
    images = latents.shape[1] if latents.ndim == 6 else 1
    sizes = zip(latents.shape[-3:], transformer.config.patch_size)
    frames, height, width = (size // patch for size, patch in sizes)
    return Layout(images * frames, height, width, text_after=text.shape[1])


def plus_layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The image, its references, then the text, which its pipeline pads in a batch and for guidance.

    The latents are packed into patches [B, S, C, …]; their sizes are in `shape_list`, the generated image's first. The
    mask that comes with the text hides what is left of S in a row with fewer patches, too: such calls have no layout.
    """
    latents, text, rows = (call.get(name) for name in ("hidden_states", "encoder_hidden_states", "shape_list"))
    if latents is None or latents.ndim != 6 or text is None or not rows:
        return None
    frames, height, width = rows[0][0]
    if any(tuple(row[0]) != (frames, height, width) for row in rows):
        return None
    masked = call.get("encoder_hidden_states_mask") is not None
    if masked and any(sum(map(math.prod, row)) != latents.shape[1] for row in rows):
        return None
    references = latents.shape[1] - frames * height * width
    return Layout(frames, height, width, text_after=references + text.shape[1])


JOYIMAGE = Family(
    name="joyimage",
    transformers=("JoyImageEditTransformer3DModel",),
    layers=("double_blocks.*.attn",),
    layout=layout,
)
JOYIMAGE_PLUS = Family(
    name="joyimage_plus",
    transformers=("JoyImageEditPlusTransformer3DModel",),
    layers=JOYIMAGE.layers,
    layout=plus_layout,
    padding_mask=True,
    text_mask="encoder_hidden_states_mask",
)

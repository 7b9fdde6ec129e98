"""Qwen-Image 2.1: text and images to edit, whose keys it keeps, then the image, in single-stream blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """Text with images to edit in it, then the image, whose tokens alone are queries.

    The keys of what stands before the image are kept from the first step on. In that step each piece of it attends in
    a call of its own, which stays dense. An image to edit has four tokens for each one that it has in the text.
    """
    latents, text, rows = (call.get(name) for name in ("hidden_states", "encoder_hidden_states", "img_shapes"))
    if latents is None or latents.ndim != 3 or text is None or not rows:
        return None
    *others, (frames, height, width) = rows[0]
    return Layout(frames, height, width, text_before=text.shape[1] + sum(map(math.prod, others)) * 3 // 4)


QWEN_IMAGE_21 = Family(
    name="qwen_image_2.1",
    transformers=("QwenImage21Transformer2DModel",),
    layers=("transformer_blocks.*.attn",),
    layout=layout,
    padding_mask=True,
    text_mask="encoder_hidden_states_mask",
    text_attends_alone=True,
)

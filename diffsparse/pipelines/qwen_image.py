"""Qwen-Image, its Edit and its Layered models: text, then images, in one sequence of double-stream blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout, num_alike


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The text tokens, the image that comes first in `img_shapes`, others as large as further frames, then the rest.

    These are layers, or what the image is made from. A mask hides padded text before the image in a batch of prompts of
    different lengths. Modular pipelines pass one that hides nothing as well.
    """
    latents, text, rows = (call.get(name) for name in ("hidden_states", "encoder_hidden_states", "img_shapes"))
    if latents is None or latents.ndim != 3 or text is None or not rows:
        return None
    # A row of the batch says its one image's shape or a list of shapes, and one shape may stand for all rows.
    rows = [rows] if isinstance(rows[0], int) else rows
    shapes, *others = ([row] if isinstance(row[0], int) else [tuple(shape) for shape in row] for row in rows)
    if any(other != shapes for other in others):
        return None
    frames, height, width = shapes[0]
    frames *= num_alike(shapes)
    references = latents.shape[1] - frames * height * width
    if references < 0:
        return None
    return Layout(frames, height, width, text_before=text.shape[1], text_after=references)


QWEN_IMAGE = Family(
    name="qwen_image",
    transformers=("QwenImageTransformer2DModel",),
    layers=("transformer_blocks.*.attn",),
    layout=layout,
    padding_mask=True,
    text_mask="encoder_hidden_states_mask",
    text_apart=True,
)

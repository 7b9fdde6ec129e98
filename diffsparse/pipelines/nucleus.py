"""Nucleus-Image: image, then text; the image alone has queries, in single-stream blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The image of `img_shapes`, whose tokens alone are queries, then the text tokens."""
    latents, text, shapes = (call.get(name) for name in ("hidden_states", "encoder_hidden_states", "img_shapes"))
    if latents is None or latents.ndim != 3 or text is None or not shapes:
        return None
    shapes = [shapes] if isinstance(shapes[0], int) else shapes
    if any(shape != shapes[0] for shape in shapes):
        return None
    frames, height, width = shapes[0]
    return Layout(frames, height, width, text_after=text.shape[1])


NUCLEUS_IMAGE = Family(
    name="nucleus_image",
    transformers=("NucleusMoEImageTransformer2DModel",),
    layers=("transformer_blocks.*.attn",),
    layout=layout,
    padding_mask=True,
    text_mask="encoder_hidden_states_mask",
)

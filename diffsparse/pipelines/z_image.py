"""Z-Image: the image as one frame, then the caption, each filled up to a multiple of 32 tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout

MULTIPLE = 32
"""The model fills image and caption up to a multiple of this, with tokens that attention sees."""


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid of the latents, a list of [C, frames, height, width], cut into patches, then filling and caption.

    Captions of a batch may differ in length; the shorter ones are padded at their end, which the mask hides. Omni
    models, whose lists hold lists, put references before the image and stay dense.
    """
    images, captions = call.get("x"), call.get("cap_feats")
    if images is None or captions is None or isinstance(images[0], list):
        return None
    sizes = {tuple(image.shape) for image in images}
    if len(sizes) != 1 or images[0].ndim != 4:
        return None
    _, frames, height, width = sizes.pop()
    patch, frame_patch = call.get("patch_size", 2), call.get("f_patch_size", 1)
    frames, height, width = frames // frame_patch, height // patch, width // patch
    filling = -(frames * height * width) % MULTIPLE
    longest = max(caption.shape[0] for caption in captions)
    return Layout(frames, height, width, text_after=filling + longest + -longest % MULTIPLE)


Z_IMAGE = Family(
    name="z_image",
    transformers=("ZImageTransformer2DModel",),
    layers=("layers.*.attention",),
    layout=layout,
    padding_mask=True,
    timestep="t",
)

"""Lumina-Image 2: text, then the image as one frame, in single-stream blocks; two more see the image alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The text tokens that the mask leaves, then the grid of the latents [B, C, height, width], cut into patches.

    How many tokens those are is nowhere but in the values of `encoder_attention_mask`, which the model waits for in
    each call as well. Where the prompts of a batch differ in length, their images start at different places.
    """
    latents, mask = call.get("hidden_states"), call.get("encoder_attention_mask")
    if latents is None or latents.ndim != 4 or mask is None:
        return None
    lengths = set(mask.sum(dim=1).tolist())
    if len(lengths) != 1:
        return None
    height, width = latents.shape[2:]
    patch = transformer.config.patch_size
    return Layout(1, height // patch, width // patch, text_before=int(lengths.pop()))


LUMINA2 = Family(
    name="lumina2",
    transformers=("Lumina2Transformer2DModel",),
    layers=("noise_refiner.*.attn", "layers.*.attn"),
    layout=layout,
)

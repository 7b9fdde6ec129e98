"""CogVideoX 1.0 and 1.5, ConsisID: text, then video, in one sequence; attention is called through torch directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The text tokens, then the grid of the latents [B, frames, C, height, width], cut into patches.

    Only version 1.5 cuts along time as well; its pipeline has padded the frames to a multiple before. Image
    to video puts its condition into more channels.
    """
    latents, text = call.get("hidden_states"), call.get("encoder_hidden_states")
    if latents is None or latents.ndim != 5 or text is None:
        return None
    frames, _, height, width = latents.shape[1:]
    patch, frame_patch = transformer.config.patch_size, transformer.config.get("patch_size_t") or 1
    return Layout(frames // frame_patch, height // patch, width // patch, text_before=text.shape[1])


COGVIDEOX = Family(
    name="cogvideox",
    transformers=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    layers=("transformer_blocks.*.attn1",),
    layout=layout,
)

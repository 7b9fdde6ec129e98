"""HunyuanVideo: video and padded text in one sequence, through double-stream, then single-stream blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid of the latents [B, C, frames, height, width], cut into patches, then the text tokens.

    Image to video puts its condition into more channels or replaces the first frame; the image's own
    embedding is part of the text. Padded text counts: the attention mask hides it.
    """
    latents, text = call.get("hidden_states"), call.get("encoder_hidden_states")
    if latents is None or latents.ndim != 5 or text is None:
        return None
    frames, height, width = latents.shape[2:]
    patch, frame_patch = transformer.config.patch_size, transformer.config.patch_size_t
    return Layout(frames // frame_patch, height // patch, width // patch, text_after=text.shape[1])


HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    transformers=("HunyuanVideoTransformer3DModel",),
    layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
    text_apart=True,
    padding_mask=True,
)

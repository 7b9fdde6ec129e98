"""Motif-Video: video, image and padded text in one sequence, through double-stream, then single-stream blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid of the latents [B, C, frames, height, width], cut into patches, then image and text tokens.

    In decoder layers, the last ones, what the encoder made of the video stands there instead, as many tokens as the
    grid has. Being no part of it they are seen by all and see all, so there is less to gain in these layers.
    """
    latents, text, image = (call.get(name) for name in ("hidden_states", "encoder_hidden_states", "image_embeds"))
    if latents is None or latents.ndim != 5 or text is None:
        return None
    frames, height, width = latents.shape[2:]
    patch, frame_patch = transformer.config.patch_size, transformer.config.patch_size_t
    num_others = text.shape[1] + (image.shape[1] if image is not None else 0)
    text_after = None if transformer.config.num_decoder_layers else num_others
    return Layout(frames // frame_patch, height // patch, width // patch, text_after=text_after)


MOTIF_VIDEO = Family(
    name="motif_video",
    transformers=("MotifVideoTransformer3DModel",),
    layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
    padding_mask=True,
    text_mask="encoder_attention_mask",
)

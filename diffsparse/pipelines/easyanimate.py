"""EasyAnimate: text, then video, in one sequence; attention is called through torch directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """Text of one or two encoders, then the grid of the latents [B, C, frames, height, width] in patches.

    What is inpainted or controls the video is put into more channels.
    """
    latents, text, text_t5 = (
        call.get(name) for name in ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_t5")
    )
    if latents is None or latents.ndim != 5 or text is None:
        return None
    frames, height, width = latents.shape[2:]
    patch = transformer.config.patch_size
    num_text = text.shape[1] + (text_t5.shape[1] if text_t5 is not None else 0)
    return Layout(frames, height // patch, width // patch, text_before=num_text)


EASYANIMATE = Family(
    name="easyanimate",
    transformers=("EasyAnimateTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    layout=layout,
)

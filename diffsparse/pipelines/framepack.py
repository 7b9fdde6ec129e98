"""HunyuanVideo Framepack: frames that exist already, video, image and text in one sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The frames before at three scales, the grid of the latents [B, C, frames, height, width], image, then text.

    With several rows padded text counts, the attention mask hides it; a single row has none, and how much text
    it has stands in the values of a mask.
    """
    latents, text, image = (call.get(name) for name in ("hidden_states", "encoder_hidden_states", "image_embeds"))
    history: list[Any] = [call.get(f"latents_{name}") for name in ("clean", "history_2x", "history_4x")]
    if latents is None or latents.ndim != 5 or text is None or image is None or any(x is None for x in history):
        return None
    batch, _, frames, height, width = latents.shape
    patch, frame_patch = transformer.config.patch_size, transformer.config.patch_size_t
    text_before = sum(history_tokens(x, scale) for x, scale in zip(history, (1, 2, 4)))
    text_after = None if batch == 1 else image.shape[1] + text.shape[1]
    return Layout(frames // frame_patch, height // patch, width // patch, text_before, text_after)


def history_tokens(latents: Tensor, scale: int) -> int:
    """How many patches of (1, 2, 2) times `scale` the latents [B, C, frames, height, width] fill, once padded."""
    return math.prod(-(-size // (scale * patch)) for size, patch in zip(latents.shape[2:], (1, 2, 2)))


FRAMEPACK = Family(
    name="framepack",
    transformers=("HunyuanVideoFramepackTransformer3DModel",),
    layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
    padding_mask=True,
)

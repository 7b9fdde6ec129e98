"""HunyuanVideo 1.5: video, then image and text of two encoders, the padding of all last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid of the latents [B, C, frames, height, width], cut into patches, then all tokens of image and text.

    Image to video puts its condition into more channels. The model sorts what is padding behind what is not, and
    hides it by a mask.
    """
    latents = call.get("hidden_states")
    texts: list[Any] = [call.get(name) for name in ("image_embeds", "encoder_hidden_states_2", "encoder_hidden_states")]
    if latents is None or latents.ndim != 5 or any(text is None for text in texts):
        return None
    frames, height, width = latents.shape[2:]
    patch, frame_patch = transformer.config.patch_size, transformer.config.patch_size_t
    num_text = sum(text.shape[1] for text in texts)
    return Layout(frames // frame_patch, height // patch, width // patch, text_after=num_text)


HUNYUAN_VIDEO_15 = Family(
    name="hunyuan_video_1.5",
    transformers=("HunyuanVideo15Transformer3DModel",),
    layers=("transformer_blocks.*.attn",),
    layout=layout,
    padding_mask=True,
    spreads_mask=True,
)

"""HiDream-I1: the image as one frame, then the text of two encoders; double-stream, then single-stream blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid of the latents [B, C, height, width], cut into patches, padding if that is not square, then the text.

    The model pads such an image to its largest size, and attention sees the padding: there is no mask. Text is that
    of T5, of Llama's last layer, and of one more layer of Llama in each block.
    """
    latents = call.get("hidden_states")
    t5, llama = call.get("encoder_hidden_states_t5"), call.get("encoder_hidden_states_llama3")
    if latents is None or latents.ndim != 4 or t5 is None or llama is None:
        return None
    patch = transformer.config.patch_size
    height, width = (size // patch for size in latents.shape[2:])
    padding = 0 if height == width else transformer.max_seq - height * width
    return Layout(1, height, width, text_after=padding + t5.shape[1] + 2 * llama.shape[-2])


HIDREAM = Family(
    name="hidream",
    transformers=("HiDreamImageTransformer2DModel",),
    layers=("double_stream_blocks.*.block.attn1", "single_stream_blocks.*.block.attn1"),
    layout=layout,
    timestep="timesteps",
)

"""HunyuanImage 2.1 and its refiner: the image, then padded text, in double-stream, then single-stream blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout
from diffsparse.pipelines.padding import check_padding_is_last


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid of the latents [B, C, (frames,) height, width], cut into patches, then the text tokens.

    The tokens of the second text encoder come before those of the first, and padding of both last: the model sees to
    that where there are two.

    Raises:
        ValueError: the text of one encoder alone is padded elsewhere than at its end.
    """
    latents, text = call.get("hidden_states"), call.get("encoder_hidden_states")
    if latents is None or text is None or latents.ndim != 2 + len(transformer.config.patch_size):
        return None
    *frames, height, width = (size // patch for size, patch in zip(latents.shape[2:], transformer.config.patch_size))
    glyphs = call.get("encoder_hidden_states_2")
    num_glyphs = 0
    if glyphs is None or transformer.config.text_embed_2_dim is None:
        check_padding_is_last(call.get("encoder_attention_mask"))
    else:
        num_glyphs = glyphs.shape[1]
    return Layout(frames[0] if frames else 1, height, width, text_after=text.shape[1] + num_glyphs)


HUNYUAN_IMAGE = Family(
    name="hunyuan_image",
    transformers=("HunyuanImageTransformer2DModel",),
    layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
    padding_mask=True,
)

"""Bria Fibo 2: the prompt's gist, the image and images to edit in one sequence; the gist last where a batch pads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffsparse.pipelines.family import Family, Layout, num_alike
from diffsparse.pipelines.position_ids import read_once


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The gist of the prompt, the grid of the latents [B, C, height, width], images to edit as large, then others.

    The gist stands at the end, padded, where prompts of a batch have gists of different length.
    """
    latents, text = call.get("hidden_states"), call.get("encoder_hidden_states")
    if latents is None or latents.ndim != 4 or text is None:
        return None
    patch = transformer.config.patch_size
    sizes = [
        tuple(size // patch for size in each.shape[2:]) for each in (latents, *(call.get("context_latents") or ()))
    ]
    images, (height, width) = num_alike(sizes), sizes[0]
    references = sum(math.prod(size) for size in sizes[images:])
    mask = call.get("encoder_attention_mask")
    lengths = [text.shape[2]] if mask is None else read_once(mask, _lengths)
    gists = {_gist_tokens(transformer.config, length) for length in lengths}
    if len(gists) == 1:
        return Layout(images, height, width, text_before=gists.pop(), text_after=references)
    return Layout(images, height, width, text_after=references + max(gists))


def _lengths(mask: Tensor) -> list[int]:
    """How many tokens of each prompt a mask [B, text tokens] leaves."""
    lengths: list[int] = mask.sum(1).tolist()
    return lengths


def _gist_tokens(config: Any, length: int) -> int:
    """Gist tokens of a prompt of so many tokens: from the least to the most as it grows, in whole steps."""
    least, most = config.min_num_gist_tokens, config.max_num_gist_tokens
    share = (length - config.gist_min_text_len) / (config.gist_max_text_len - config.gist_min_text_len)
    steps = math.ceil((least + min(1.0, max(0.0, share)) * (most - least)) / config.gist_step)
    return min(most, max(least, steps * config.gist_step))


BRIA_FIBO2 = Family(
    name="bria_fibo2",
    transformers=("BriaFibo2Transformer2DModel",),
    # The blocks that refine the image before the gist joins it stay dense, two of 46.
    layers=("layers.*.attention",),
    layout=layout,
    padding_mask=True,
)

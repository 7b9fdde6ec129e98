"""Wan 2.1 and 2.2, and models built on it: video tokens only, the prompt enters by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid of the latents [B, C, frames, height, width], cut into patches.

    Image to video puts its condition into more channels, or (Wan 2.2 5B) into the first frame; the timestep
    is then one per token. Neither adds a token. Reference images of VACE and Animate are frames of the latents,
    before the video's. SkyReels-V2 brings a mask of all pairs where it generates block by block: dense then.
    """
    latents = call.get("hidden_states")
    if latents is None or latents.ndim != 5:
        return None
    sizes = zip(latents.shape[2:], transformer.config.patch_size)
    return Layout(*(size // patch for size, patch in sizes))


WAN = Family(
    name="wan",
    transformers=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "ChronoEditTransformer3DModel",
    ),
    # VACE's control blocks run first.
    layers=("vace_blocks.*.attn1", "blocks.*.attn1"),
    layout=layout,
)

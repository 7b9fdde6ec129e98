"""LTX-Video: video tokens only, packed into one sequence by the pipeline, which says their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid that the call names, if it has as many tokens as the latents [B, S, C].

    With `video_coords` the model goes by these instead: pipelines pass them when condition tokens stand
    before the video's, with no sizes or with ones. The grid is unknown then.
    """
    latents = call.get("hidden_states")
    if latents is None or latents.ndim != 3 or call.get("video_coords") is not None:
        return None
    frames, height, width = (call.get(name) for name in ("num_frames", "height", "width"))
    if frames is None or height is None or width is None or frames * height * width != latents.shape[1]:
        return None
    return Layout(int(frames), int(height), int(width))


LTX = Family(
    name="ltx",
    transformers=("LTXVideoTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    layout=layout,
)

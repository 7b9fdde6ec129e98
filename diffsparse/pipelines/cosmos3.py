"""Cosmos 3: text, then video, sound and actions; all but the text have queries, and several heads share their keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The text, whose own causal attention stays dense, the grid of the video, then sound and actions."""
    videos, shapes, text, tokens = (
        call.get(name) for name in ("vision_tokens", "vision_token_shapes", "und_len", "sequence_length")
    )
    if videos is None or len(videos) != 1 or not shapes or text is None or tokens is None:
        return None
    frames, height, width = shapes[0]
    return Layout(frames, height, width, text_before=text, text_after=tokens - text - math.prod(shapes[0]))


COSMOS3 = Family(
    name="cosmos3",
    transformers=("Cosmos3OmniTransformer",),
    layers=("layers.*.self_attn",),
    layout=layout,
    text_attends_alone=True,
    timestep="vision_timesteps",
)

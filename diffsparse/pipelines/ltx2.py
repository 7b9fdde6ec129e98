"""LTX-2: video tokens only, packed; audio runs beside them in layers of its own, which stay dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid that the call names, then the tokens of keyframes and references: what else the latents [B, S, C] have.

    Without all three sizes the model goes by the coordinates of each token, and the grid is unknown.
    """
    latents = call.get("hidden_states")
    frames, height, width = (call.get(name) for name in ("num_frames", "height", "width"))
    if latents is None or latents.ndim != 3 or frames is None or height is None or width is None:
        return None
    num_others = latents.shape[1] - frames * height * width
    return None if num_others < 0 else Layout(int(frames), int(height), int(width), text_after=int(num_others))


LTX2 = Family(
    name="ltx2",
    transformers=("LTX2VideoTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    layout=layout,
    text_apart=False,
)

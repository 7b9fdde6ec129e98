"""Krea 2: text that is padded within, then the image as one frame, in single-stream blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffsparse.pipelines.family import Family, Layout
from diffsparse.pipelines.position_ids import read_once


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The text tokens, of which a mask hides the padding, then the grid of the position ids."""
    latents, text, ids = (call.get(name) for name in ("hidden_states", "encoder_hidden_states", "position_ids"))
    if latents is None or latents.ndim != 3 or text is None or ids is None:
        return None
    height, width = read_once(ids, _grid_size)
    if height * width != latents.shape[1]:
        return None
    return Layout(1, height, width, text_before=text.shape[1])


def _grid_size(ids: Tensor) -> tuple[int, int]:
    """Height and width of the grid in ids [S, 3] of (time, row, column); those of the text are 0."""
    height, width = (ids[:, 1:].amax(0).int() + 1).tolist()
    return height, width


KREA2 = Family(
    name="krea2",
    transformers=("Krea2Transformer2DModel",),
    layers=("transformer_blocks.*.attn",),
    layout=layout,
    padding_mask=True,
    text_mask="encoder_attention_mask",
)

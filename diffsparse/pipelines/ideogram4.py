"""Ideogram 4: text that is padded at its front, then the image, in single-stream blocks; another model has no text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffsparse.pipelines.family import Family, Layout
from diffsparse.pipelines.position_ids import read_once


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The text tokens, of which a mask hides the padding, then the grid of the position ids; without text the grid.

    None where several images are packed in a row, each with its text, none of which sees the others.
    """
    packed, ids, segments = (call.get(name) for name in ("hidden_states", "position_ids", "segment_ids"))
    if packed is None or packed.ndim != 3 or ids is None or segments is None or not read_once(segments, _is_one_image):
        return None
    height, width = read_once(ids, _grid_size)
    return Layout(1, height, width, text_before=packed.shape[1] - height * width)


def _is_one_image(segments: Tensor) -> bool:
    """Whether each row of segments [B, S] is that of its last token, but for padding, which is -1."""
    return bool(((segments == segments[:, -1:]) | (segments < 0)).all())


def _grid_size(ids: Tensor) -> tuple[int, int]:
    """Height and width of the grid at the end of ids [B, S, 3] of (time, row, column), which are 0 from its time on."""
    time, row, column = ids[0, -1].tolist()
    return row - time + 1, column - time + 1


IDEOGRAM4 = Family(
    name="ideogram4",
    transformers=("Ideogram4Transformer2DModel",),
    layers=("layers.*.attention",),
    layout=layout,
    padding_mask=True,
    text_mask="indicator",
    masks_pairs=True,
)

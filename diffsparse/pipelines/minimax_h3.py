"""MiniMax-H3: text, condition frames, audio and the video in one packed sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffsparse.pipelines.family import Family, Layout
from diffsparse.pipelines.position_ids import read_once


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """Text, condition frames and audio, then the grid of the generated video that the position ids end with."""
    latents, ids = call.get("hidden_states"), call.get("position_ids")
    if latents is None or ids is None or latents.ndim != 3:
        return None
    grid = read_once(ids, _grid_at_end)
    if grid is None or math.prod(grid) > latents.shape[1]:
        return None
    return Layout(*grid, text_before=ids.shape[0] - math.prod(grid))


def _grid_at_end(ids: Tensor) -> tuple[int, int, int] | None:
    """Frames, height and width of the video that ids [S, 3] of (time, row, column) end with; None if it is no grid.

    All its frames have the rows and columns of the last one, and rising times. A condition frame before it does not:
    the first one has the time of the first frame.
    """
    same_time = ids[:, 0] == ids[-1, 0]
    frame_size = int(same_time.flip(0).cumprod(0).sum())
    frames = ids[ids.shape[0] % frame_size :].reshape(-1, frame_size, 3)
    time, last = frames[:, 0, 0], frames[-1]
    is_frame = (frames[:, :, 0] == time[:, None]).all(1) & (frames[:, :, 1:] == last[:, 1:]).all((1, 2))
    is_frame[:-1] &= time[:-1] < time[1:]
    width = int((last[:, 1] == last[0, 1]).cumprod(0).sum())
    height = frame_size // width
    rows, columns = last[: height * width, 1].view(height, width), last[: height * width, 2].view(height, width)
    if height * width != frame_size or (rows != rows[:, :1]).any() or (columns != columns[0]).any():
        return None
    return int(is_frame.flip(0).cumprod(0).sum()), height, width


MINIMAX_H3 = Family(
    name="minimax_h3",
    transformers=("MiniMaxH3Transformer3DModel",),
    layers=("transformer_blocks.*.attn",),
    layout=layout,
    text_apart=False,
)

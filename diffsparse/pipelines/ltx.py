"""LTX-Video: video tokens, packed into one sequence by the pipeline, and condition tokens before them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffsparse.pipelines.family import Family, Layout
from diffsparse.pipelines.position_ids import read_once


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """Condition tokens, if any, then the grid: what the call names, or what the coordinates of all tokens end with.

    `LTXConditionPipeline` passes no sizes, and one tensor of coordinates at each step. A pipeline that passes both
    makes its coordinates anew at each step, where reading them would wait for the device: the grid is unknown.
    """
    latents, coords = call.get("hidden_states"), call.get("video_coords")
    sizes = tuple(call.get(name) for name in ("num_frames", "height", "width"))
    if latents is None or latents.ndim != 3:
        return None
    num_tokens = latents.shape[1]
    if coords is not None:
        if sizes != (None, None, None) or coords.shape[-1] != num_tokens:
            return None
        grid = read_once(coords, _grid_at_end)
        return None if grid is None else Layout(*grid, text_before=num_tokens - math.prod(grid))
    frames, height, width = sizes
    if frames is None or height is None or width is None or frames * height * width != num_tokens:
        return None
    return Layout(int(frames), int(height), int(width))


def _grid_at_end(coords: Tensor) -> tuple[int, int, int] | None:
    """Frames, height and width of the video that [B, (time, row, column), S] ends with; None if it is no full grid.

    Its first frame is the last one at time 0. The frames of a condition may rise in time as those of the video do.
    """
    times, sizes = (x.tolist() for x in torch.unique_consecutive(coords[0, 0], return_counts=True))
    if 0 not in times:
        return None
    frames, frame_size = times[::-1].index(0) + 1, sizes[-1]
    times = times[-frames:]
    rows, columns = coords[0, 1:, -frames * frame_size :]
    width = int(torch.unique_consecutive(rows[:frame_size], return_counts=True)[1][0])
    height = frame_size // width
    if sizes[-frames:] != [height * width] * frames:
        return None
    rows, columns = rows.view(frames, height, width), columns.view(frames, height, width)
    is_grid = (
        times == sorted(set(times))
        and bool((rows == rows[:1, :, :1]).all())
        and bool((columns == columns[:1, :1]).all())
        and bool((rows[0, 1:, 0] > rows[0, :-1, 0]).all())
        and bool((columns[0, 0, 1:] > columns[0, 0, :-1]).all())
    )
    return (frames, height, width) if is_grid else None


LTX = Family(
    name="ltx",
    transformers=("LTXVideoTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    layout=layout,
    text_apart=False,
)

"""LTX-2: video tokens only, packed; audio runs beside them in layers of its own, which stay dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffsparse.pipelines.family import Family, Layout
from diffsparse.pipelines.position_ids import read_once


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The grid that the call names, then the tokens of keyframes and references: what else the latents [B, S, C] have.

    Where it names none, as the pipelines of keyframe slots and their tiles (DFR), the coordinates begin with it. Echo
    has its memory of earlier shots before the grid, which the coordinates show.
    """
    latents = call.get("hidden_states")
    coords: Any = call.get("video_coords")
    frames, height, width = (call.get(name) for name in ("num_frames", "height", "width"))
    if latents is None or latents.ndim != 3:
        return None
    sizes = frames, height, width
    names_none = sizes == (None, None, None)
    has_coords = coords is not None and coords.ndim == 4 and coords.shape[2] == latents.shape[1]
    if names_none and has_coords:
        sizes = read_once(coords, _grid_at_start) or sizes
    frames, height, width = sizes
    if frames is None or height is None or width is None:
        return None
    num_others = latents.shape[1] - frames * height * width
    if num_others < 0:
        return None
    if has_coords and not names_none and num_others > 0:
        at_start, at_end = read_once(coords, _grids_at_both_ends)
        if at_end == sizes != at_start:
            return Layout(int(frames), int(height), int(width), text_before=int(num_others))
    return Layout(int(frames), int(height), int(width), text_after=int(num_others))


def _grids_at_both_ends(coords: Tensor) -> tuple[tuple[int, int, int] | None, tuple[int, int, int] | None]:
    return _grid_at_start(coords), _grid_at_start(-coords.flip(2))


def _grid_at_start(coords: Tensor) -> tuple[int, int, int] | None:
    """Frames, height and width of the grid that [B, (time, row, column), S, (start, end)] begins with; None for none.

    Its frames rise in time. A keyframe behind the last one that is as large is one more of them.
    """
    starts = coords[0, ..., 0]
    frame_size = int((starts[0] == starts[0, 0]).cumprod(0).sum())
    width = int((starts[1, :frame_size] == starts[1, 0]).cumprod(0).sum())
    height = frame_size // width
    if height * width != frame_size:
        return None
    whole = starts.shape[1] // frame_size * frame_size
    times, rows, columns = starts[:, :whole].reshape(3, -1, frame_size)
    first_rows, first_columns = rows[0].view(height, width), columns[0].view(height, width)
    is_grid = (
        bool((first_rows == first_rows[:, :1]).all())
        and bool((first_columns == first_columns[:1]).all())
        and bool((first_rows[1:] > first_rows[:-1]).all())
        and bool((first_columns[:, 1:] > first_columns[:, :-1]).all())
    )
    if not is_grid:
        return None
    is_frame = ((rows == rows[0]) & (columns == columns[0]) & (times == times[:, :1])).all(1)
    is_frame[1:] &= times[1:, 0] > times[:-1, 0]
    return int(is_frame.cumprod(0).sum()), height, width


LTX2 = Family(
    name="ltx2",
    transformers=("LTX2VideoTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    layout=layout,
    text_apart=False,
)

"""FLUX.1, and models laid out like it: text, then images as frames; double-stream, then single-stream blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffsparse.pipelines.family import Family, Layout
from diffsparse.pipelines.position_ids import read_once


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The text tokens, the grid of the position ids, references as large as further frames, then others (Kontext)."""
    latents, text, ids = (call.get(name) for name in ("hidden_states", "encoder_hidden_states", "img_ids"))
    if latents is None or text is None or ids is None or ids.shape[-2] != latents.shape[1]:
        return None
    size = read_once(ids, _grid_size)
    if size is None:
        return None
    return Layout(*size, text_before=text.shape[1], text_after=latents.shape[1] - math.prod(size))


def _grid_size(ids: Tensor) -> tuple[int, int, int] | None:
    """Images, height and width of the grid that the ids on the CPU begin with; None if the first is no full grid.

    An id is (which image, row, column). The generated image comes first, row by row; references have
    another first number.
    """
    ids = ids[0] if ids.ndim == 3 else ids
    num_tokens = int((ids[:, 0] == ids[0, 0]).cumprod(0).sum())
    rows, columns = ids[:num_tokens, 1], ids[:num_tokens, 2]
    # Where the first row ends; the ids themselves may be too coarse to tell, bfloat16 has no 257.
    width = int((rows == rows[0]).cumprod(0).sum())
    height = num_tokens // width
    if height * width != num_tokens:
        return None
    is_grid = (
        bool((rows.reshape(height, width) == rows[::width, None]).all())
        and bool((columns.reshape(height, width) == columns[:width]).all())
        and bool((columns[1:width] >= columns[: width - 1]).all())
        and (width == 1 or bool(columns[0] < columns[1]))
    )
    if not is_grid:
        return None
    places = ids[: len(ids) // num_tokens * num_tokens, 1:3].reshape(-1, num_tokens, 2)
    return int((places == places[0]).all((1, 2)).cumprod(0).sum()), height, width


FLUX = Family(
    name="flux",
    transformers=(
        "FluxTransformer2DModel",
        "BriaTransformer2DModel",
        "OvisImageTransformer2DModel",
        "LongCatImageTransformer2DModel",
    ),
    layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
    text_apart=True,
)

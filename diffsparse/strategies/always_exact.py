"""What a strategy keeps exact whatever its rule: text, each query block's own place, and where asked the first frame.

All of it stands in a few blocks, because every order ends with it: `[video | text]`, or with the first frame moved
to the text's side `[other frames | first frame | text]`. In a token-major order the first frame left in its place
would have a token in nearly every block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffsparse.block_mask import num_blocks
from diffsparse.grid import TokenGrid


def first_frame_last(grid: TokenGrid, order: Tensor) -> Tensor:
    """The order [..., S], which has its text last, with the first frame moved between the other frames and the text.

    The tokens of the frame keep their order among themselves. An image, a grid of one frame, stays as it is.
    """
    if grid.frames == 1:
        return order
    frame = (order - grid.text_before).div(grid.height * grid.width, rounding_mode="floor")
    is_text = (order < grid.text_before) | (frame >= grid.frames)
    part = torch.where(is_text, 2, (frame == 0).long())
    return order.gather(-1, torch.argsort(part, dim=-1, stable=True))


def exact_blocks(
    grid: TokenGrid,
    query_block_size: int,
    key_block_size: int,
    *,
    first_frame_queries: bool = False,
    first_frame_keys: bool = False,
    own_place: bool = True,
) -> Tensor:
    """The pairs of a query block and a key block that are always computed: [Q, K] bool.

    Text queries see all and text keys are seen by all; so do the queries and are the keys of the first frame where
    asked, for orders made by `first_frame_last`. A block with a single such token counts whole. Every query block sees
    the key blocks nearest to it, unless `own_place` says that keys have an order of their own. The first frame of an
    image is no special frame.
    """
    distance = block_distance(grid.num_tokens, query_block_size, key_block_size)
    exact = (distance == distance.amin(-1, keepdim=True)) & own_place
    if (place := first_exact_place(grid, first_frame_queries)) < grid.num_tokens:
        exact[place // query_block_size :] = True
    if (place := first_exact_place(grid, first_frame_keys)) < grid.num_tokens:
        exact[:, place // key_block_size :] = True
    return exact


def first_exact_place(grid: TokenGrid, first_frame: bool = False) -> int:
    """The place in the order from which on tokens are exact: where the text begins, or the first frame moved before it.

    S where there is neither.
    """
    with_frame = first_frame and grid.frames > 1
    return grid.num_video_tokens - (grid.height * grid.width if with_frame else 0)


def block_distance(num_tokens: int, query_block_size: int, key_block_size: int) -> Tensor:
    """Tokens between the centres of query and key blocks, [Q, K] float32."""
    query_centres, key_centres = (
        (torch.arange(num_blocks(num_tokens, size)).float() + 0.5) * size for size in (query_block_size, key_block_size)
    )
    return (query_centres[:, None] - key_centres).abs()

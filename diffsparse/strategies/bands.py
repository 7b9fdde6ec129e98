"""Bands in blocks: the key blocks that lie near a query block in some order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.strategies.always_exact import first_exact_place, first_frame_last


def half_width(density: float, num_tokens: int) -> float:
    """How far a token sees to either side, in tokens, for a band to keep this share of the pairs of `num_tokens`.

    What keeps |i - j| <= w of n tokens keeps 1 - (1 - w / n)^2 of their pairs. 0 where the density is not positive.
    """
    return float(num_tokens * (1 - (1 - min(max(density, 0.0), 1.0)) ** 0.5))


def half_width_beside_text(density: float, grid: TokenGrid) -> float:
    """How far a video token sees to either side for band and text together to keep this share of all pairs.

    0 where text alone takes more.
    """
    pairs, video_pairs = grid.num_tokens**2, grid.num_video_tokens**2
    return half_width((density * pairs - (pairs - video_pairs)) / video_pairs, grid.num_video_tokens)


def band(
    query_positions: Tensor, key_positions: Tensor, half_width: float, query_block_size: int, key_block_size: int
) -> Tensor:
    """Which blocks are at most `half_width` apart, from centre to centre: [Q, K] bool.

    By centres, a block is seen when about half of its tokens would be, so that the band keeps the share of blocks
    that it would keep of tokens, up to one block a row. A query block whose tokens stand further apart than a block
    is long sees what the outermost of them would.

    Args:
        query_positions, key_positions: [S] where the token at each place stands, which need not be that place; NaN
            for one that is to count for nothing.
        half_width: in the units of the positions.
    """
    queries, keys = _in_blocks(query_positions, query_block_size), _in_blocks(key_positions, key_block_size)
    length = queries.nan_to_num(-torch.inf).amax(-1) - queries.nan_to_num(torch.inf).amin(-1) + 1
    reach = half_width + (length - query_block_size).clamp(min=0) / 2
    # NaN, the centre of a block without a position, is near nothing.
    return (queries.nanmean(-1)[:, None] - keys.nanmean(-1)).abs() <= reach[:, None]


def band_with_first_frame_moved(
    grid: TokenGrid, order: Tensor, half_width: float, query_block_size: int, key_block_size: int
) -> tuple[Tensor, Tensor]:
    """The order [S] with the first frame moved to the text's side, and the band of the order before that, [Q, K] bool.

    The tokens of the first frame keep their position in the band. A query block that they share with another frame
    sees what both would see.
    """
    moved = first_frame_last(grid, order)
    positions = torch.argsort(order)[moved].double()
    place = torch.arange(grid.num_tokens)
    is_first_frame = place >= first_exact_place(grid, first_frame=True)
    # Text is exact whatever the band.
    positions = positions.masked_fill(place >= grid.num_video_tokens, torch.nan)
    parts = [positions.masked_fill(left_out, torch.nan) for left_out in (is_first_frame, ~is_first_frame)]
    near = [band(part, positions, half_width, query_block_size, key_block_size) for part in parts]
    return moved, near[0] | near[1]


def _in_blocks(positions: Tensor, block_size: int) -> Tensor:
    """Positions [S] by block, the last one filled up with NaN: [number of blocks, block_size] float64."""
    return F.pad(positions.double(), (0, -len(positions) % block_size), value=torch.nan).view(-1, block_size)

"""Windows of tiles around each tile of the video, as a map of the blocks that the order by tiles is cut into."""

from __future__ import annotations

import torch
from torch import Tensor

from diffsparse.block_mask import num_blocks
from diffsparse.grid import TokenGrid
from diffsparse.permutation import tile_of_token


def blocks_of_windows(
    grid: TokenGrid,
    tile: tuple[int, int, int],
    window: tuple[int, int, int],
    query_block_size: int,
    key_block_size: int,
    *,
    moved_inwards: bool,
) -> Tensor:
    """The pairs of blocks that hold tokens of a tile and of one in its window: [Q, K] bool, on the CPU.

    Args:
        grid: its tokens are in `tile_order`, text last, which is in no window.
        tile: frames, height, width of a tile, in tokens. Tiles at the far sides may be smaller.
        window: frames, height, width of a window, in tiles, with its tile in the middle.
        query_block_size, key_block_size: tokens a block.
        moved_inwards: whether a window at the border of the grid is moved, so that it is as large as any other, and not
            cut off.
    """
    # A pair of tiles sees one another where their places along each of the three sides do.
    seen = torch.ones(1, 1, dtype=torch.float32)
    for size, side, width in zip((grid.frames, grid.height, grid.width), tile, window):
        seen = torch.kron(seen, _window(num_blocks(size, side), width, moved_inwards).float())
    tiles = tile_of_token(grid, tile).sort().values  # of each place in the order
    queries, keys = (_tiles_of_blocks(tiles, size, grid.num_tokens) for size in (query_block_size, key_block_size))
    return queries @ seen @ keys.T > 0


def _window(tiles: int, width: int, moved_inwards: bool) -> Tensor:
    """Which of `tiles` in a row each of them sees: `width` around itself. [T, T] bool."""
    place = torch.arange(tiles)
    first = place - width // 2
    if moved_inwards:
        first = first.clamp(min=0, max=max(0, tiles - width))
    return (place >= first[:, None]) & (place < first[:, None] + width)


def _tiles_of_blocks(tiles: Tensor, block_size: int, num_tokens: int) -> Tensor:
    """Which tiles each block has tokens of, [blocks, T] float32 of 0 and 1; blocks of text have none."""
    holds = torch.zeros(num_blocks(num_tokens, block_size), int(tiles[-1]) + 1, dtype=torch.float32)
    holds[torch.arange(len(tiles)) // block_size, tiles] = 1.0
    return holds

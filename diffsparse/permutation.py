"""The order of the tokens, per head, and its inverse."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.kernels.reorder import gather_tokens, scatter_tokens

AXES = ("frame", "height", "width")


def axis_order(grid: TokenGrid, axes: Sequence[str]) -> Tensor:
    """The tokens sorted by `axes`, outermost first, text last: token indices [S], on the CPU.

    `("frame", "height", "width")` is the natural, frame-major order; `("height", "width", "frame")` puts the
    same place of all frames side by side, the token-major order.

    Raises:
        ValueError: `axes` is not an arrangement of "frame", "height", "width".
    """
    if sorted(axes) != sorted(AXES):
        raise ValueError(f"`axes` must be an arrangement of {AXES}, got {tuple(axes)}.")
    video = _video_tokens(grid).permute([AXES.index(axis) for axis in axes])
    return _with_text_last(grid, video.reshape(-1))


def tile_order(grid: TokenGrid, tile: tuple[int, int, int]) -> Tensor:
    """The tokens sorted by tiles of frames x height x width, text last: token indices [S], on the CPU.

    Inside a tile the order is frame-major. Tiles at the far sides of the grid may be smaller, so any grid will do.

    Raises:
        ValueError: a tile side that is not positive.
    """
    # A stable sort keeps the frame-major order inside each tile.
    by_tile = torch.argsort(tile_of_token(grid, tile), stable=True)
    return _with_text_last(grid, _video_tokens(grid).reshape(-1)[by_tile])


def hilbert_order(grid: TokenGrid) -> Tensor:
    """The tokens along a Hilbert curve through frames, rows and columns, text last: token indices [S], on the CPU.

    The curve fills the smallest cube, or square, of a power of two that holds the grid, one neighbour after the other;
    what it meets outside the grid is left out. J. Skilling, Programming the Hilbert curve, AIP Conference Proceedings
    707, 2004.
    """
    # An image is a plane, and its curve one of the plane.
    sides = [side for side in (grid.frames, grid.height, grid.width) if side > 1] or [1]
    num_bits = (max(sides) - 1).bit_length()
    places = torch.meshgrid(*(torch.arange(side, device="cpu") for side in sides), indexing="ij")
    axes = [place.reshape(-1).clone() for place in places]
    for bit in reversed(range(1, num_bits)):
        below = (1 << bit) - 1
        for axis in axes:
            turned = (axis >> bit) & 1 == 1
            exchanged = torch.where(turned, 0, (axes[0] ^ axis) & below)
            axes[0] ^= torch.where(turned, below, exchanged)
            axis ^= exchanged
    for before, axis in itertools.pairwise(axes):
        axis ^= before
    flips = torch.zeros(grid.num_video_tokens, dtype=torch.long, device="cpu")
    for bit in range(1, num_bits):
        flips ^= torch.where((axes[-1] >> bit) & 1 == 1, (1 << bit) - 1, 0)
    along = torch.zeros_like(flips)
    for bit in reversed(range(num_bits)):
        for axis in axes:
            along = (along << 1) | (((axis ^ flips) >> bit) & 1)
    return _with_text_last(grid, _video_tokens(grid).reshape(-1)[along.argsort()])


def tile_of_token(grid: TokenGrid, tile: tuple[int, int, int]) -> Tensor:
    """The number of the tile of each video token, tiles counted frame-major: [num_video_tokens] int64, on the CPU.

    Raises:
        ValueError: a tile side that is not positive.
    """
    if min(tile) < 1:
        raise ValueError(f"`tile` must have three positive sides, in tokens, got {tile}.")
    sizes = (grid.frames, grid.height, grid.width)
    places = torch.meshgrid(*(torch.arange(size, device="cpu") for size in sizes), indexing="ij")
    number = torch.zeros(sizes, dtype=torch.long, device="cpu")
    for place, side, size in zip(places, tile, sizes):
        number = number * -(-size // side) + place // side
    return number.reshape(-1)


def _video_tokens(grid: TokenGrid) -> Tensor:
    tokens = torch.arange(grid.num_video_tokens, device="cpu") + grid.text_before
    return tokens.view(grid.frames, grid.height, grid.width)


def _with_text_last(grid: TokenGrid, video: Tensor) -> Tensor:
    before = torch.arange(grid.text_before, device="cpu")
    after = torch.arange(grid.num_tokens - grid.text_after, grid.num_tokens, device="cpu")
    return torch.cat([video, before, after])


@dataclass(frozen=True, eq=False)
class Permutation:
    """A token order per head: place i of head h holds token `order[h, i]`.

    Attributes:
        orders: [N, S] int64, each row an arrangement of 0..S-1.
        choice: [H] int64, which of the orders each head takes: heads are many, orders few, and a plan keeps no more
            than it must. None where N is H or 1.
    """

    orders: Tensor
    choice: Tensor | None = None

    @property
    def order(self) -> Tensor:
        """The order of each head, [H|1, S] int64."""
        return self.orders if self.choice is None else self.orders.index_select(0, self.choice)

    def of_first(self, num_tokens: int) -> Permutation:
        """The order of so many tokens, the first ones, which come first in this order as well."""
        return replace(self, orders=self.orders[:, :num_tokens].contiguous())

    def apply(self, x: Tensor) -> Tensor:
        """The tokens of x [B, H, S, D] in this order, [B, H, S, D] contiguous."""
        return gather_tokens(x, self.order)

    def undo(self, x: Tensor) -> Tensor:
        """Put the tokens of x [B, H, S, D] back where apply took them from.

        The result is [B, H, S, D] with the memory layout [B, S, H, D], which the output projection wants.
        """
        return scatter_tokens(x, self.order)

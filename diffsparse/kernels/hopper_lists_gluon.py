"""The list of key blocks that a query block sees, taken a tile at a time. For the Hopper kernel.

A tile is a block of 128 keys or two of 64. A block that is not whole comes first.
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Keys taken at a time: one key block or two.
TILE = gl.constexpr(128)


@gluon.jit
def find_ragged(list_ptr, stride, count, num_keys, KEY_BLOCK: gl.constexpr):
    """Where a list has the key block that is cut off by the end, and its size: it goes first, all others are whole.

    Without it, the first place and the size of a whole block.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    PLACES: gl.constexpr = 1024
    place = 0
    size = KEY_BLOCK
    num_left = num_keys % KEY_BLOCK
    if num_left != 0:
        found = -1
        for first in range(0, count, PLACES):
            places = first + gl.arange(0, PLACES, layout=layout)
            blocks = gl.load(list_ptr + places * stride, mask=places < count, other=-1)
            found = gl.maximum(found, gl.max(gl.where(blocks == num_keys // KEY_BLOCK, places, -1), 0))
        place = gl.maximum(found, 0)
        size = gl.where(found >= 0, num_left, KEY_BLOCK)
    return place, size


@gluon.jit
def blocks_of(tile, lists, KEY_BLOCK: gl.constexpr):
    """The key block of a listed tile, twice, or the two of them."""
    list_ptr, stride, _, num_missing, ragged_place = lists
    BLOCKS_PER_TILE: gl.constexpr = TILE // KEY_BLOCK
    first = gl.load(list_ptr + _place(tile * BLOCKS_PER_TILE, num_missing, ragged_place) * stride)
    second = first
    if BLOCKS_PER_TILE == 2:
        second = gl.load(list_ptr + _place(tile * 2 + 1, num_missing, ragged_place) * stride)
    return first, second


@gluon.jit
def sizes_of(tile, lists, length, KEY_BLOCK: gl.constexpr):
    """How many keys of the blocks of a listed tile exist: a whole block or more, or fewer, or none."""
    first, second = blocks_of(tile, lists, KEY_BLOCK)
    return length - first * KEY_BLOCK, length - second * KEY_BLOCK


@gluon.jit
def _place(slot, num_missing, ragged_place):
    """The place in the list of what is copied as number `slot`: the first and the ragged block change places.

    Where a tile is not full it is the first one. What is missing is filled up with a block that is there.
    """
    place = gl.maximum(slot - num_missing, 0)
    return gl.where(place == 0, ragged_place, gl.where(place == ragged_place, 0, place))


@gluon.jit
def existing(columns, first_size, second_size, KEY_BLOCK: gl.constexpr):
    """Which keys of a tile exist, [TILE]."""
    in_first = columns < KEY_BLOCK
    return gl.where(in_first, columns < first_size, columns - KEY_BLOCK < second_size)

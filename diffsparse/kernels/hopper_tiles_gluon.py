"""Tiles in shared memory, and how they come: where the versions of Triton differ, 3.6 to 3.9."""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

import functools
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.8 has both names, 3.9 only the first.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
# 3.9 has the name without the underscore alone.
HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@functools.cache
def descriptor_layout(element_size: int, columns: int) -> Any:
    """How tiles [1, 1, rows, columns] lie in shared memory, as both the copies and the matrix products ask for."""
    return gl.NVMMASharedLayout(min(columns * element_size, 128), element_bitwidth=8 * element_size, rank=4)


@gluon.constexpr_function
def tile_layout(dtype, columns):
    """The same of tiles [rows, columns]."""
    bits = dtype.primitive_bitwidth
    return gl.NVMMASharedLayout(min(columns * bits // 8, 128), element_bitwidth=bits, rank=2)


@gluon.constexpr_function
def row_layout(dtype, columns):
    """How a warpgroup holds rows of so many numbers that it takes from memory, or puts there: 16 bytes a thread."""
    numbers = 128 // dtype.primitive_bitwidth
    return gl.BlockedLayout([1, numbers], [32 * numbers // columns, columns // numbers], [4, 1], [1, 0])


@gluon.jit
def tiles_of(dtype: gl.constexpr, count: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr):
    """Shared memory for so many tiles [rows, columns]."""
    return gl.allocate_shared_memory(dtype, [count, rows, columns], tile_layout(dtype, columns))


@gluon.jit
def tiles_in(memory, dtype: gl.constexpr, count: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr):
    """The same in memory that has served other tiles."""
    shape: gl.constexpr = [count, rows, columns]
    layout: gl.constexpr = tile_layout(dtype, columns)
    if HAS_REINTERPRET:  # noqa: SIM108 (the compiler would look at both halves)
        tiles = memory.reinterpret(dtype, shape, layout)
    else:
        tiles = memory._reinterpret(dtype, shape, layout)
    return tiles

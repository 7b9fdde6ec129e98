"""Rows of queries, keys and values as the Triton kernel takes them from memory, INT4 out of its bytes."""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(
    ptr,
    num_rows,
    stride,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    MASKED: tl.constexpr = True,
):
    """Rows [ROWS, PADDED_DIM] from `ptr` on, zeros beyond the head dim, and with MASKED from `num_rows` on."""
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED_DIM)[None, :]
    if MASKED and HEAD_DIM != PADDED_DIM:
        rows_of_it = tl.load(ptr + rows * stride + dims, mask=(rows < num_rows) & (dims < HEAD_DIM), other=0.0)
    elif MASKED:
        rows_of_it = tl.load(ptr + rows * stride + dims, mask=rows < num_rows, other=0.0)
    elif HEAD_DIM != PADDED_DIM:
        rows_of_it = tl.load(ptr + rows * stride + dims, mask=dims < HEAD_DIM, other=0.0)
    else:
        rows_of_it = tl.load(ptr + rows * stride + dims)
    return rows_of_it


@triton.jit
def load_packed(
    ptr,
    num_rows,
    stride,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    MASKED: tl.constexpr = True,
):
    """The same of rows of INT4, two a byte."""
    return unpacked(load_rows(ptr, num_rows, stride, ROWS, (HEAD_DIM + 1) // 2, PADDED_DIM // 2, MASKED))


@triton.jit
def load_in_halves(ptr, num_rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Contiguous rows [ROWS, PADDED_DIM] of numbers that are not packed, their dims in the order of `unpacked`."""
    WIDTH: tl.constexpr = (HEAD_DIM + 1) // 2
    rows, places = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED_DIM)[None, :]
    dims = places % 2 * WIDTH + places // 2
    mask = (rows < num_rows) & (places // 2 < WIDTH) & (dims < HEAD_DIM)
    return tl.load(ptr + rows * HEAD_DIM + dims, mask=mask, other=0.0)


@triton.jit
def unpacked(packed):
    """INT4 two a byte [n, w] as int8 [n, 2 w]. Queries and keys alike: any order of their dims gives the same product.

    The two of a byte stay next to each other, so that no number goes to another thread.
    """
    lower = (packed << 4).to(tl.int8, bitcast=True) >> 4
    upper = packed.to(tl.int8, bitcast=True) >> 4
    return tl.join(lower, upper).reshape(packed.shape[0], 2 * packed.shape[1])

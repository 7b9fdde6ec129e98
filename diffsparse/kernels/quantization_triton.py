"""Quantized operands of attention in one pass over each tensor: order, smooth, quantize and pool.

Held to `quantization.py`, which is the specification. A program takes one block of tokens of one head, which it reads
once. Values take two passes, because a channel's scale needs all of its tokens.
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsparse.kernels.launch import FUSION, launch_on, step_of_heads
from diffsparse.kernels.quantization import E4M3_MAX, INT8_MAX, LEAST_ABSMAX

LEAST = tl.constexpr(LEAST_ABSMAX)
# Added and taken away again, it leaves fp32 no bits below 1: rounded to nearest, halves to even. Compiled code may add
# it to the exact product: then a value a rounding away from a half goes to the other side of it.
ROUNDER = tl.constexpr(1.5 * 2.0**23)
# Channels of values that a program takes, at most: more, transposed, do not fit into its registers.
MAX_CHANNELS = 128
LARGEST = {"int8": INT8_MAX, "int4": 7.0, "fp8": E4M3_MAX}
DTYPES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}


class QuantizedBlocks(NamedTuple):
    """Queries or keys: values [B, H, S, D] in their order, scales [B, H, K] fp32, block means [B, H, K, D] or None."""

    values: Tensor
    scales: Tensor
    means: Tensor | None


class QuantizedValues(NamedTuple):
    """Values [B, H, D, S'] in their order, scales [B, H, D] fp32, block means [B, H, K, D] or None."""

    values: Tensor
    scales: Tensor
    means: Tensor | None


def quantize_blocks(
    x: Tensor,
    block_size: int,
    number: str,
    *,
    order: Tensor | None = None,
    mean: Tensor | None = None,
    key_length: Tensor | None = None,
    pool: bool = False,
) -> QuantizedBlocks:
    """Blocks of x [B, H, S, D] as "int8", "int4" (two a byte, as `pack_int4`: [B, H, S, ceil(D / 2)]) or "fp8".

    Args:
        x: its last stride must be 1.
        block_size: tokens, a power of two.
        number: what to round to.
        order: [H|1, S] int64, which token comes at each place; as it is if None.
        mean: [B, H, 1, D] fp32, what to take away first: `key_mean` of keys.
        key_length: [B], what is in the order at or beyond it becomes 0 and does not count.
        pool: return the means of the blocks too, without `mean`, in x's dtype; not quantized.
    """
    batch, heads, num_tokens, head_dim = x.shape
    num_blocks = triton.cdiv(num_tokens, block_size)
    width = triton.cdiv(head_dim, 2) if number == "int4" else head_dim
    padded_width = triton.next_power_of_2(width)
    values = torch.empty((batch, heads, num_tokens, width), dtype=DTYPES[number], device=x.device)
    scales = torch.empty((batch, heads, num_blocks), dtype=torch.float32, device=x.device)
    means = x.new_empty((batch, heads, num_blocks, head_dim)) if pool else None
    with launch_on(x.device):
        quantize_blocks_kernel[(num_blocks, batch * heads)](
            x,
            order,
            None if mean is None else mean.contiguous(),
            key_length,
            values,
            scales,
            means,
            *x.stride()[:3],
            step_of_heads(order),
            heads,
            num_tokens,
            HEAD_DIM=head_dim,
            WIDTH=width,
            PADDED_WIDTH=padded_width,
            BLOCK=block_size,
            LARGEST=LARGEST[number],
            num_warps=num_warps(block_size * padded_width * (2 if number == "int4" else 1)),
            **FUSION,
        )
    return QuantizedBlocks(values, scales, means)


def quantize_values(
    value: Tensor,
    block_size: int,
    number: str,
    *,
    order: Tensor | None = None,
    key_length: Tensor | None = None,
    pool: bool = False,
    interleave: bool = False,
) -> QuantizedValues:
    """Values [B, H, S, D], whose last stride must be 1, as "int8" or "fp8" [B, H, D, S'].

    Arguments as in `quantize_blocks`. `block_size` is a multiple of 16. Whatever the order, what is at or beyond
    `key_length` stays there. `interleave` gives them as `quantization.interleaved` does.
    """
    batch, heads, num_tokens, head_dim = value.shape
    num_blocks, channels = triton.cdiv(num_tokens, block_size), min(triton.next_power_of_2(head_dim), MAX_CHANNELS)
    padded_tokens = triton.cdiv(num_tokens, 16) * 16
    absmax = torch.zeros((batch, heads, head_dim), dtype=torch.float32, device=value.device)
    shape = batch, heads, head_dim, padded_tokens
    values = torch.empty(shape, dtype=DTYPES[number], device=value.device)
    means = value.new_empty((batch, heads, num_blocks, head_dim)) if pool else None
    grid = num_blocks, batch * heads, triton.cdiv(head_dim, channels)
    shapes = {"HEAD_DIM": head_dim, "CHANNELS": channels, "BLOCK": block_size}
    warps = num_warps(block_size * channels)
    with launch_on(value.device):
        channel_absmax_kernel[grid](
            value, key_length, absmax, *value.stride()[:3], heads, num_tokens, **shapes, num_warps=warps, **FUSION
        )
        absmax.clamp_(min=LEAST_ABSMAX)
        quantize_values_kernel[grid](
            value,
            order,
            key_length,
            LARGEST[number] / absmax,
            values,
            means,
            *value.stride()[:3],
            step_of_heads(order),
            heads,
            num_tokens,
            padded_tokens,
            **shapes,
            INTERLEAVE=interleave,
            num_warps=warps,
            **FUSION,
        )
    return QuantizedValues(values, absmax / LARGEST[number], means)


def num_warps(num_elements: int) -> int:
    """For a tile of this many elements: at most 64 a thread, half of its registers in fp32."""
    return min(max(num_elements // (64 * 32), 4), 16)


@triton.jit
def quantize_blocks_kernel(
    x_ptr,
    order_ptr,
    mean_ptr,
    key_length_ptr,
    values_ptr,
    scales_ptr,
    means_ptr,
    x_stride_b,
    x_stride_h,
    x_stride_s,
    order_stride_h,
    heads,
    num_tokens,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """One block of one head. Packed values hold the head dim in two halves: so does the program."""
    PACKED: tl.constexpr = values_ptr.dtype.element_ty == tl.uint8
    block = tl.program_id(0)
    head_of_batch = tl.program_id(1).to(tl.int64)
    b, h = head_of_batch // heads, head_of_batch % heads
    block_of_all = head_of_batch * tl.num_programs(0) + block
    places = block * BLOCK + tl.arange(0, BLOCK)
    exists = places < _length(key_length_ptr, b, num_tokens)
    # [BLOCK]
    rows = _rows(order_ptr, h * order_stride_h, places, exists)
    row_ptrs = x_ptr + b * x_stride_b + h * x_stride_h + rows * x_stride_s
    mean_ptr = None if mean_ptr is None else mean_ptr + head_of_batch * HEAD_DIM
    dims = tl.arange(0, PADDED_WIDTH)
    in_low = dims < WIDTH
    # [BLOCK, PADDED_WIDTH]
    low = _load_smooth(row_ptrs, mean_ptr, exists, dims, in_low)
    absmax = _max(_max(tl.abs(low), 1), 0)
    if PACKED:
        in_high = WIDTH + dims < HEAD_DIM
        in_high = in_high & in_low
        # [BLOCK, PADDED_WIDTH]
        high = _load_smooth(row_ptrs, mean_ptr, exists, WIDTH + dims, in_high)
        absmax = _larger(absmax, _max(_max(tl.abs(high), 1), 0))
    if means_ptr is not None:
        means_ptr += block_of_all * HEAD_DIM
        _store_mean(means_ptr, low, exists, dims, in_low)
        if PACKED:
            _store_mean(means_ptr, high, exists, WIDTH + dims, in_high)

    absmax = _larger(absmax, LEAST)
    tl.store(scales_ptr + block_of_all, tl.div_rn(absmax, LARGEST))
    stretch = tl.div_rn(LARGEST, absmax)
    if PACKED:
        lower, upper = rounded(low * stretch).to(tl.int32), rounded(high * stretch).to(tl.int32)
        values = ((lower & 15) | ((upper & 15) << 4)).to(tl.uint8)
    elif values_ptr.dtype.element_ty == tl.int8:
        values = rounded(low * stretch).to(tl.int8)
    else:
        values = (low * stretch).to(values_ptr.dtype.element_ty)
    first_row = head_of_batch * num_tokens + block * BLOCK
    offsets = tl.arange(0, BLOCK)[:, None] * WIDTH + dims[None, :]
    tl.store(values_ptr + first_row * WIDTH + offsets, values, mask=(places < num_tokens)[:, None] & in_low[None, :])


@triton.jit
def channel_absmax_kernel(
    value_ptr,
    key_length_ptr,
    absmax_ptr,
    value_stride_b,
    value_stride_h,
    value_stride_s,
    heads,
    num_tokens,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some channels of one block into the largest of each, which starts at 0."""
    head_of_batch = tl.program_id(1).to(tl.int64)
    b, h = head_of_batch // heads, head_of_batch % heads
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = places < _length(key_length_ptr, b, num_tokens)
    row_ptrs = value_ptr + b * value_stride_b + h * value_stride_h + places.to(tl.int64) * value_stride_s
    dims = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    in_head = dims < HEAD_DIM
    # [BLOCK, CHANNELS]
    value = _load_smooth(row_ptrs, None, exists, dims, in_head)
    tl.atomic_max(absmax_ptr + head_of_batch * HEAD_DIM + dims, _max(tl.abs(value), 0), mask=in_head)


@triton.jit
def quantize_values_kernel(
    value_ptr,
    order_ptr,
    key_length_ptr,
    stretch_ptr,
    values_ptr,
    means_ptr,
    value_stride_b,
    value_stride_h,
    value_stride_s,
    order_stride_h,
    heads,
    num_tokens,
    padded_tokens,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVE: tl.constexpr,
):
    """Some channels of one block of one head, stored with the tokens along the rows."""
    block = tl.program_id(0)
    head_of_batch = tl.program_id(1).to(tl.int64)
    b, h = head_of_batch // heads, head_of_batch % heads
    places = block * BLOCK + tl.arange(0, BLOCK)
    # Where what is stored at the places comes from.
    sources = places
    if INTERLEAVE:
        pairs = places // 2 % 8
        sources += 2 * (pairs % 2 * 4 + pairs // 2 - pairs)
    exists = sources < _length(key_length_ptr, b, num_tokens)
    rows = _rows(order_ptr, h * order_stride_h, sources, exists)
    row_ptrs = value_ptr + b * value_stride_b + h * value_stride_h + rows * value_stride_s
    dims = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    in_head = dims < HEAD_DIM
    # [BLOCK, CHANNELS]
    value = _load_smooth(row_ptrs, None, exists, dims, in_head)
    if means_ptr is not None:
        means_ptr += (head_of_batch * tl.num_programs(0) + block) * HEAD_DIM
        _store_mean(means_ptr, value, exists, dims, in_head)
    stretch = tl.load(stretch_ptr + head_of_batch * HEAD_DIM + dims, mask=in_head, other=0.0)
    value *= stretch[None, :]
    if values_ptr.dtype.element_ty == tl.int8:
        value = rounded(value)
    # [CHANNELS, BLOCK]
    values = value.to(values_ptr.dtype.element_ty).T
    # A head's values may be more than 32 bits count.
    channel_ptrs = values_ptr + (head_of_batch * HEAD_DIM + dims) * padded_tokens
    tl.store(channel_ptrs[:, None] + places[None, :], values, mask=in_head[:, None] & (places < padded_tokens)[None, :])


@triton.jit
def _length(key_length_ptr, b, num_tokens):
    """How many tokens of batch entry b exist."""
    length = num_tokens
    if key_length_ptr is not None:
        length = tl.minimum(tl.load(key_length_ptr + b).to(tl.int32), num_tokens)
    return length


@triton.jit
def _rows(order_ptr, offset, places, exists):
    """Which tokens [BLOCK] int64 come at the places."""
    rows = places.to(tl.int64)
    if order_ptr is not None:
        rows = tl.load(order_ptr + offset + places, mask=exists, other=0)
    return rows


@triton.jit
def _load_smooth(row_ptrs, mean_ptr, exists, dims, in_head):
    """The dims of the rows less their mean [BLOCK, PADDED_WIDTH] fp32, 0 where there is nothing."""
    mask = exists[:, None] & in_head[None, :]
    x = tl.load(row_ptrs[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + dims, mask=in_head, other=0.0)
        x = tl.where(mask, x - mean[None, :], 0.0)
    return x


@triton.jit
def _store_mean(means_ptr, x, exists, dims, in_head):
    """The mean of x [BLOCK, PADDED_WIDTH] over the tokens that exist; 0 of none."""
    count = tl.maximum(tl.sum(exists.to(tl.int32), 0), 1)
    mean = tl.sum(x, 0) / count.to(tl.float32)
    tl.store(means_ptr + dims, mean.to(means_ptr.dtype.element_ty), mask=in_head)


@triton.jit
def _max(x, AXIS: tl.constexpr):
    """The largest along an axis, or NaN if there is one: integers would hide it."""
    return tl.reduce(x, AXIS, _larger)


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rounded(x):
    """To the nearest whole number, halves to even."""
    return (x + ROUNDER) - ROUNDER

"""What candidate masks cost the sampled rows of each head, in two passes over a row's sums by key block.

It is held to the PyTorch code of `heads.BlockSums.errors`.
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsparse.kernels.launch import FUSION, launch_on

LEAST = tl.constexpr(torch.finfo(torch.float32).min)
KEY_TILE = 16
DIM_TILE = 64
PEAKS = 1024
"""Key blocks and numbers of a head that a program takes at a time; masks times key blocks where it looks for peaks.

Small, because a product that is nearly exact is three, which take many registers.
"""
OPTIONS = {"num_warps": 4, "num_stages": 4}


def mask_errors(
    numerators: Tensor,
    denominators: Tensor,
    peaks: Tensor,
    tail: Tensor,
    mean_value: Tensor,
    rank: Tensor,
    always: Tensor,
    limits: Tensor,
) -> tuple[Tensor, Tensor]:
    """Squared errors [H, 2, C, N + 1] of masks, without and with the pooled tail, and squared sizes [H].

    Both are sums over the sampled rows and the batch, NaN where a row sees no key.

    Args:
        numerators, denominators, peaks, tail, mean_value: fields of `heads.BlockSums`.
        rank, always, limits: what `heads.BlockSums.errors` takes.
    """
    batch, heads, rows, num_blocks, dim = numerators.shape
    rules, num_limits = rank.shape[3], len(limits)
    num_masks = rules * num_limits
    chosen = constants(dim, num_masks)
    dim_tiles = triton.cdiv(dim, chosen["DIM_TILE"])
    rank = (rank if rank.stride(4) == 1 else rank.contiguous()).expand(batch, heads, -1, -1, -1)
    squares = numerators.new_empty((batch, heads, rows, dim_tiles, 2 * num_masks + 1))
    with launch_on(numerators.device):
        mask_errors_kernel[(dim_tiles, rows, batch * heads)](
            *(x.contiguous() for x in (numerators, denominators, peaks, tail, mean_value)),
            rank,
            always.contiguous().view(torch.uint8),
            limits,
            squares,
            *rank.stride()[:4],
            heads,
            num_blocks,
            num_limits,
            num_masks,
            **chosen,
            **OPTIONS,
            **FUSION,
        )
    by_head = squares.sum((0, 2, 3))  # [H, 2 * C * (N + 1) + 1]
    return by_head[:, :-1].unflatten(1, (2, rules, num_limits)), by_head[:, -1]


def constants(dim: int, num_masks: int) -> dict[str, int]:
    """What the kernel is compiled for: the same for up to 16 masks, which are more than an order has by default."""
    padded_masks = triton.next_power_of_2(max(num_masks, 16))
    return {
        "HEAD_DIM": dim,
        "DIM_TILE": min(triton.next_power_of_2(max(dim, 16)), DIM_TILE),
        "PADDED_MASKS": padded_masks,
        "PEAK_TILE": max(PEAKS // padded_masks, 16),
        "KEY_TILE": KEY_TILE,
    }


# How many blocks, heads and masks there are, and where their numbers lie, is not compiled in: another resolution or
# density compiles nothing.
@triton.jit(
    do_not_specialize=[
        "rank_stride_b",
        "rank_stride_h",
        "rank_stride_r",
        "rank_stride_c",
        "heads",
        "num_blocks",
        "num_limits",
        "num_masks",
    ],
    do_not_specialize_on_alignment=["denominators_ptr", "peaks_ptr", "tail_ptr"],
)
def mask_errors_kernel(
    numerators_ptr,
    denominators_ptr,
    peaks_ptr,
    tail_ptr,
    mean_value_ptr,
    rank_ptr,
    always_ptr,
    limits_ptr,
    squares_ptr,
    rank_stride_b,
    rank_stride_h,
    rank_stride_r,
    rank_stride_c,
    heads,
    num_blocks,
    num_limits,
    num_masks,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    PADDED_MASKS: tl.constexpr,
    PEAK_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
):
    """All masks of one sampled row, in some numbers of its head.

    Mask m is rule m // num_limits at limit m % num_limits. What pads their number repeats the last one.
    """
    row = tl.program_id(1).to(tl.int64)
    head_of_batch = tl.program_id(2).to(tl.int64)
    b, h = head_of_batch // heads, head_of_batch % heads
    # 64 bits: numerators and ranks may be more than 32 count.
    row_of_all = head_of_batch * tl.num_programs(1) + row
    numerators_ptr += row_of_all * num_blocks * HEAD_DIM
    denominators_ptr += row_of_all * num_blocks
    peaks_ptr += row_of_all * num_blocks
    tail_ptr += row_of_all * num_blocks
    mean_value_ptr += head_of_batch * num_blocks * HEAD_DIM
    rank_ptr += b * rank_stride_b + h * rank_stride_h + row * rank_stride_r
    always_ptr += row * num_blocks
    masks = tl.arange(0, PADDED_MASKS)
    mask = tl.minimum(masks, num_masks - 1)
    rank_ptrs = rank_ptr + (mask // num_limits).to(tl.int64) * rank_stride_c
    # [PADDED_MASKS]
    limits = tl.load(limits_ptr + mask % num_limits).to(tl.int32)

    peak = tl.full([PADDED_MASKS, PEAK_TILE], LEAST, tl.float32)
    tail_peak = tl.full([PADDED_MASKS, PEAK_TILE], -float("inf"), tl.float32)
    for first in range(0, num_blocks, PEAK_TILE):
        blocks = first + tl.arange(0, PEAK_TILE)
        seen_peaks, hidden_tail = logits_of(rank_ptrs, limits, always_ptr, peaks_ptr, tail_ptr, blocks, num_blocks)
        peak = tl.maximum(peak, seen_peaks)
        tail_peak = tl.maximum(tail_peak, hidden_tail)
    # [PADDED_MASKS]
    peak = tl.max(peak, 1)
    peak_with_tail = tl.maximum(peak, tl.max(tail_peak, 1))

    dims = tl.program_id(0) * DIM_TILE + tl.arange(0, DIM_TILE)
    in_head = dims < HEAD_DIM
    numerator = tl.zeros([PADDED_MASKS, DIM_TILE], tl.float32)
    tail_numerator = tl.zeros([PADDED_MASKS, DIM_TILE], tl.float32)
    denominator = tl.zeros([PADDED_MASKS, KEY_TILE], tl.float32)
    tail_denominator = tl.zeros([PADDED_MASKS, KEY_TILE], tl.float32)
    for first in range(0, num_blocks, KEY_TILE):
        blocks = first + tl.arange(0, KEY_TILE)
        exists = blocks < num_blocks
        offsets = blocks[:, None] * HEAD_DIM + dims[None, :]
        is_number = exists[:, None] & in_head[None, :]
        # [KEY_TILE, DIM_TILE]
        numerators = tl.load(numerators_ptr + offsets, mask=is_number, other=0.0)
        mean_value = tl.load(mean_value_ptr + offsets, mask=is_number, other=0.0)
        # [KEY_TILE]
        denominators = tl.load(denominators_ptr + blocks, mask=exists, other=0.0)
        seen_peaks, hidden_tail = logits_of(rank_ptrs, limits, always_ptr, peaks_ptr, tail_ptr, blocks, num_blocks)
        # [PADDED_MASKS, KEY_TILE]
        factors = tl.exp(seen_peaks - peak[:, None])
        tail_factors = tl.exp(hidden_tail - peak_with_tail[:, None])
        # Nearly as exact as float32, by three products of tensor cores: an error of 1e-4 counts.
        numerator = tl.dot(factors, numerators, numerator, input_precision="tf32x3")
        tail_numerator = tl.dot(tail_factors, mean_value, tail_numerator, input_precision="tf32x3")
        denominator += factors * denominators[None, :]
        tail_denominator += tail_factors

    # [PADDED_MASKS, 1]
    denominators = tl.sum(denominator, 1, keep_dims=True)
    tail_denominators = tl.sum(tail_denominator, 1, keep_dims=True)
    share = tl.exp(peak - peak_with_tail)[:, None]
    # [PADDED_MASKS, DIM_TILE]
    without_tail = numerator / denominators
    with_tail = (numerator * share + tail_numerator) / (denominators * share + tail_denominators)
    # [1, DIM_TILE], of the first mask that shows all blocks
    exact = tl.sum(tl.where((masks == num_limits - 1)[:, None], without_tail, 0.0), 0, keep_dims=True)
    squares_ptr += (row_of_all * tl.num_programs(0) + tl.program_id(0)) * (2 * num_masks + 1)
    is_mask = masks < num_masks
    tl.store(squares_ptr + masks, squared_sizes(without_tail - exact), mask=is_mask)
    tl.store(squares_ptr + num_masks + masks, squared_sizes(with_tail - exact), mask=is_mask)
    tl.store(squares_ptr + 2 * num_masks + tl.arange(0, 1), squared_sizes(exact))


@triton.jit
def logits_of(rank_ptrs, limits, always_ptr, peaks_ptr, tail_ptr, blocks, num_blocks):
    """Peaks of the blocks that each mask shows, and tail of those that it hides, [PADDED_MASKS, tile]; else -inf."""
    exists = blocks < num_blocks
    # [tile]
    always = tl.load(always_ptr + blocks, mask=exists, other=0) != 0
    peaks = tl.load(peaks_ptr + blocks, mask=exists, other=-float("inf"))
    tail = tl.load(tail_ptr + blocks, mask=exists, other=-float("inf"))
    # [PADDED_MASKS, tile]
    rank = tl.load(rank_ptrs[:, None] + blocks[None, :], mask=exists[None, :], other=0)
    seen = (rank < limits[:, None]) | always[None, :]
    return tl.where(seen, peaks[None, :], -float("inf")), tl.where(seen, -float("inf"), tail[None, :])


@triton.jit
def squared_sizes(x):
    """Of the rows of x [n, DIM_TILE]: [n]."""
    return tl.sum(x * x, 1)

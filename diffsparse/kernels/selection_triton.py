"""The key blocks with the highest scores, as packed bits, in Triton: a program a query block.

It is held to PyTorch, in `strategies/select_blocks.py`.
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsparse.kernels.launch import FUSION, launch_on

# Blocks taken at a time.
CHUNK = 512
INFINITE = tl.constexpr(0x7F800000)
ALWAYS = tl.constexpr(0x7F800001)


def select_blocks(scores: Tensor, counts: Tensor, always: Tensor) -> tuple[Tensor, Tensor]:
    """`bits` [B, H, Q, ceil(K / 8)] uint8 and `counts` [B, H, Q] int32 of the `BlockMask` of these scores.

    Args:
        scores: [B, H|1, Q, K] float32.
        counts: [H] how many blocks each head wants.
        always: [Q, K] bool.
    """
    batch, _, rows, num_blocks = scores.shape
    heads = len(counts)
    scores = scores.contiguous().expand(-1, heads, -1, -1)
    bits = torch.empty((batch, heads, rows, triton.cdiv(num_blocks, 8)), dtype=torch.uint8, device=scores.device)
    num_seen = torch.empty((batch, heads, rows), dtype=torch.int32, device=scores.device)
    with launch_on(scores.device):
        select_kernel[(rows, heads, batch)](
            scores,
            counts.contiguous(),
            always.contiguous(),
            bits,
            num_seen,
            *scores.stride()[:2],
            num_blocks,
            CHUNK=CHUNK,
            **FUSION,
        )
    return bits, num_seen


# How many blocks there are, and where their scores lie, is not compiled in: another resolution compiles nothing.
@triton.jit(do_not_specialize=["scores_stride_b", "scores_stride_h", "num_blocks"])
def select_kernel(
    scores_ptr,
    counts_ptr,
    always_ptr,
    bits_ptr,
    num_seen_ptr,
    scores_stride_b,
    scores_stride_h,
    num_blocks,
    CHUNK: tl.constexpr,
):
    """Find what the blocks of one query block must reach to be among the highest, then pack those that do."""
    # 64 bits: all rows together may have more scores than 32 count.
    row, h, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    scores_ptr += b * scores_stride_b + h * scores_stride_h + row * num_blocks
    always_ptr += row * num_blocks
    count = tl.maximum(tl.load(counts_ptr + h), 1).to(tl.int32)

    # At least `count` blocks, or all, reach `low`; fewer reach `high`. At most 32 halves lie between.
    low, high = -INFINITE, ALWAYS + 1
    num_from_low, num_from_high = num_blocks, 0
    while (num_from_low > count) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)  # their mean; the sum may not fit in 32 bits
        num_from_middle = number_from(middle, scores_ptr, always_ptr, num_blocks, CHUNK)
        enough = num_from_middle >= count
        low, num_from_low = tl.where(enough, middle, low), tl.where(enough, num_from_middle, num_from_low)
        high, num_from_high = tl.where(enough, high, middle), tl.where(enough, num_from_high, num_from_middle)

    # What reaches only `low` is equal, or all of it is wanted.
    num_wanted = count - num_from_high
    num_equal, num_seen = 0, 0
    row_of_all = (b * tl.num_programs(1) + h) * tl.num_programs(0) + row
    num_bytes = (num_blocks + 7) // 8
    bits_ptr += row_of_all * num_bytes
    for first in range(0, num_blocks, CHUNK):
        # [CHUNK]
        places = places_of(first, scores_ptr, always_ptr, num_blocks, CHUNK)
        is_equal = ((places >= low) & (places < high)).to(tl.int32)
        equal_before = num_equal + tl.cumsum(is_equal, 0) - is_equal
        num_equal += tl.sum(is_equal, 0)
        is_highest = (places >= high) | ((is_equal != 0) & (equal_before < num_wanted))
        is_seen = (is_highest | (places == ALWAYS)).to(tl.int32)
        num_seen += tl.sum(is_seen, 0)
        # [CHUNK / 8]
        packed = tl.sum(is_seen.reshape(CHUNK // 8, 8) << tl.arange(0, 8)[None, :], 1)
        bytes_of_it = first // 8 + tl.arange(0, CHUNK // 8)
        tl.store(bits_ptr + bytes_of_it, packed.to(tl.uint8), mask=bytes_of_it < num_bytes)
    tl.store(num_seen_ptr + row_of_all, num_seen)


@triton.jit
def number_from(place, scores_ptr, always_ptr, num_blocks, CHUNK: tl.constexpr):
    """How many blocks reach this place."""
    # [CHUNK]
    reached = tl.zeros([CHUNK], tl.int32)
    for first in range(0, num_blocks, CHUNK):
        reached += (places_of(first, scores_ptr, always_ptr, num_blocks, CHUNK) >= place).to(tl.int32)
    return tl.sum(reached, 0)


@triton.jit
def places_of(first, scores_ptr, always_ptr, num_blocks, CHUNK: tl.constexpr):
    """The scores of the blocks from `first` on as integers of the same order, [CHUNK] int32.

    NaN is infinite. What is always seen lies above all others, what does not exist below.
    """
    # [CHUNK]
    blocks = first + tl.arange(0, CHUNK)
    exists = blocks < num_blocks
    score = tl.load(scores_ptr + blocks, mask=exists, other=0.0).to(tl.int32, bitcast=True)
    is_always = tl.load(always_ptr + blocks, mask=exists, other=0)
    # Sign and magnitude: -0.0 is the same integer as 0.0.
    magnitude = score & 0x7FFFFFFF
    is_negative = (score < 0) & (magnitude <= INFINITE)
    place = tl.where(is_negative, -magnitude, tl.minimum(magnitude, INFINITE))
    place = tl.where(is_always != 0, ALWAYS, place)
    return tl.where(exists, place, -INFINITE - 1)

"""Lists of key blocks in Triton: made of packed bits, and read for what is not in them. A program a query block.

It is held to PyTorch: `lists_of` to `BlockMask.lists`, `tail_logs` to `pooling.py`.
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsparse.kernels.launch import FUSION, launch_on

# Blocks or entries of a list taken at a time.
CHUNK = 1024


def lists_of(bits: Tensor, num_blocks: int) -> Tensor:
    """The blocks whose bits are set, ascending, then zeros: [..., K] int32 of bits [..., ceil(K / 8)] uint8.

    The first block is the lowest bit of the first byte.
    """
    lists = torch.empty((*bits.shape[:-1], num_blocks), dtype=torch.int32, device=bits.device)
    with launch_on(bits.device):
        lists_kernel[(bits.shape[:-1].numel(),)](bits.contiguous(), lists, num_blocks, CHUNK=CHUNK, **FUSION)
    return lists


def tail_logs(
    key_blocks: Tensor,
    counts: Tensor,
    num_keys: int,
    key_block_size: int,
    key_length: Tensor | None,
    num_padded: int,
) -> Tensor:
    """What `pooling.tail_logs` gives: [B, H, Q, num_padded] fp32."""
    batch, heads, rows = counts.shape
    logs = torch.empty((*counts.shape, num_padded), dtype=torch.float32, device=counts.device)
    with launch_on(counts.device):
        tail_logs_kernel[(rows, batch * heads)](
            key_blocks,
            counts,
            None if key_length is None else key_length.contiguous(),
            logs,
            *key_blocks.stride(),
            *counts.stride(),
            heads,
            num_keys,
            key_block_size,
            num_padded,
            CHUNK=CHUNK,
            **FUSION,
        )
    return logs


# How many blocks there are is not compiled in: another resolution compiles nothing.
@triton.jit(do_not_specialize=["num_blocks"])
def lists_kernel(bits_ptr, lists_ptr, num_blocks, CHUNK: tl.constexpr):
    """List what one query block sees from the front, and a zero for every other block from the back.

    So each entry is written once, and how many there are need not be known beforehand.
    """
    # 64 bits: all lists together may have more entries than 32 count.
    row = tl.program_id(0).to(tl.int64)
    bits_ptr += row * ((num_blocks + 7) // 8)
    lists_ptr += row * num_blocks
    num_seen = 0
    for first in range(0, num_blocks, CHUNK):
        # [CHUNK]
        blocks = first + tl.arange(0, CHUNK)
        exists = blocks < num_blocks
        packed = tl.load(bits_ptr + blocks // 8, mask=exists, other=0).to(tl.int32)
        is_seen = (packed >> (blocks % 8)) & 1
        seen_before = num_seen + tl.cumsum(is_seen, 0) - is_seen
        unseen_before = blocks - seen_before
        place = tl.where(is_seen != 0, seen_before, num_blocks - 1 - unseen_before)
        tl.store(lists_ptr + place, tl.where(is_seen != 0, blocks, 0), mask=exists)
        num_seen += tl.sum(is_seen, 0)


# Nor how many keys and heads there are, and where their lists lie. Whether rows of logarithms begin at multiples of 16
# is: it makes stores of 16 bytes of them.
@triton.jit(
    do_not_specialize=[
        "lists_stride_b",
        "lists_stride_h",
        "lists_stride_q",
        "counts_stride_b",
        "counts_stride_h",
        "counts_stride_q",
        "heads",
        "num_keys",
    ]
)
def tail_logs_kernel(
    key_blocks_ptr,
    counts_ptr,
    key_length_ptr,
    logs_ptr,
    lists_stride_b,
    lists_stride_h,
    lists_stride_q,
    lists_stride_c,
    counts_stride_b,
    counts_stride_h,
    counts_stride_q,
    heads,
    num_keys,
    key_block_size,
    num_padded,
    CHUNK: tl.constexpr,
):
    """Write the logarithms of all blocks' sizes for one query block, then -inf for those that are listed.

    `key_length_ptr` may be None.
    """
    row = tl.program_id(0).to(tl.int64)
    head_of_batch = tl.program_id(1).to(tl.int64)
    b, h = head_of_batch // heads, head_of_batch % heads
    logs_ptr += (head_of_batch * tl.num_programs(0) + row) * num_padded
    lists_ptr = key_blocks_ptr + b * lists_stride_b + h * lists_stride_h + row * lists_stride_q
    count = tl.load(counts_ptr + b * counts_stride_b + h * counts_stride_h + row * counts_stride_q)
    length = num_keys
    if key_length_ptr is not None:
        length = tl.minimum(tl.load(key_length_ptr + b), num_keys).to(tl.int32)
    for first in range(0, num_padded, CHUNK):
        # [CHUNK]
        blocks = first + tl.arange(0, CHUNK)
        size = tl.minimum(tl.maximum(length - blocks * key_block_size, 0), key_block_size)
        log = tl.where(size > 0, tl.log2(tl.maximum(size, 1).to(tl.float32)), -float("inf"))
        tl.store(logs_ptr + blocks, log, mask=blocks < num_padded)
    # A listed block's logarithm was written by another thread: its -inf comes after it.
    tl.debug_barrier()
    for first in range(0, count, CHUNK):
        # [CHUNK]
        entries = first + tl.arange(0, CHUNK)
        is_listed = entries < count
        block = tl.load(lists_ptr + entries * lists_stride_c, mask=is_listed, other=0)
        tl.store(logs_ptr + block, tl.full([CHUNK], -float("inf"), tl.float32), mask=is_listed)

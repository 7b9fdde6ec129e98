"""Attention of a few rows summed by key block, in one pass over keys and values: what `heads.py` judges masks by."""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsparse.kernels.launch import FUSION, launch_on

LEAST = tl.constexpr(torch.finfo(torch.float32).min)
LARGEST_TILES = 96 << 10
"""Bytes of a program's queries, keys and values, for which every GPU has room in shared memory."""


def fits(rows: int, dim: int, block_size: int, element_size: int) -> bool:
    """Whether the kernel takes so many rows and keys of so many numbers, in blocks of that many tokens, and bytes each.

    What does not fit raises at its launch, however well smaller blocks ran before.
    """
    padded_rows, padded_dim, padded_block = (triton.next_power_of_2(max(size, 16)) for size in (rows, dim, block_size))
    return (padded_rows + 2 * padded_block) * padded_dim * element_size <= LARGEST_TILES


def block_sums(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    order: Tensor | None = None,
    key_length: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The fields of `heads.BlockSums`, in their order, of query [B, H, R, D] fp32, key and value [B, H, S, D].

    Products are in key's dtype. Keys and values are read in the `order` [S] int64 without a copy of them.
    """
    batch, heads, rows, dim = query.shape
    tokens = key.shape[2]
    blocks = triton.cdiv(tokens, block_size)
    query = query.to(key.dtype).contiguous()
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    numerators = query.new_empty((batch, heads, rows, blocks, dim), dtype=torch.float32)
    sums = query.new_empty((3, batch, heads, rows, blocks), dtype=torch.float32)
    means = query.new_empty((2, batch, heads, blocks, dim), dtype=torch.float32)
    with launch_on(query.device):
        block_sums_kernel[(blocks, batch * heads)](
            query,
            key,
            value,
            None if order is None else order.contiguous(),
            None if key_length is None else key_length.contiguous(),
            numerators,
            sums,
            means,
            *key.stride()[:3],
            *value.stride()[:3],
            heads,
            rows,
            tokens,
            HEAD_DIM=dim,
            PADDED_DIM=triton.next_power_of_2(max(dim, 16)),
            PADDED_ROWS=triton.next_power_of_2(max(rows, 16)),
            BLOCK=block_size,
            PADDED_BLOCK=triton.next_power_of_2(max(block_size, 16)),
            **FUSION,
        )
    return numerators, *sums.unbind(), *means.unbind()


@triton.jit
def block_sums_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    order_ptr,
    key_length_ptr,
    numerators_ptr,
    sums_ptr,
    means_ptr,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    value_stride_b,
    value_stride_h,
    value_stride_s,
    heads,
    num_rows,
    num_tokens,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_BLOCK: tl.constexpr,
):
    """All rows of one head against one key block. `order_ptr` and `key_length_ptr` may be None."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    head_of_batch = tl.program_id(1).to(tl.int64)
    b, h = head_of_batch // heads, head_of_batch % heads
    dims = tl.arange(0, PADDED_DIM)
    in_head = dims < HEAD_DIM
    rows = tl.arange(0, PADDED_ROWS)
    is_row = rows < num_rows
    offsets = (head_of_batch * num_rows + rows)[:, None] * HEAD_DIM + dims[None, :]
    # [PADDED_ROWS, PADDED_DIM]
    query = tl.load(query_ptr + offsets, mask=is_row[:, None] & in_head[None, :], other=0.0)

    within = tl.arange(0, PADDED_BLOCK)
    places = (block * BLOCK + within).to(tl.int64)
    is_token = (within < BLOCK) & (places < num_tokens)
    tokens = places
    if order_ptr is not None:
        tokens = tl.load(order_ptr + places, mask=is_token, other=0)
    mask = is_token[:, None] & in_head[None, :]
    key_ptr += b * key_stride_b + h * key_stride_h
    value_ptr += b * value_stride_b + h * value_stride_h
    # [PADDED_BLOCK, PADDED_DIM]
    key = tl.load(key_ptr + tokens[:, None] * key_stride_s + dims[None, :], mask=mask, other=0.0)
    value = tl.load(value_ptr + tokens[:, None] * value_stride_s + dims[None, :], mask=mask, other=0.0)
    size = tl.sum(is_token.to(tl.float32), 0)

    # [PADDED_ROWS, PADDED_BLOCK]
    logits = tl.dot(query, key.T, input_precision="ieee")
    # The row against the mean key; what does not exist is zero.
    tail = tl.sum(logits, 1) / size + tl.log(size)
    exists = is_token
    if key_length_ptr is not None:
        exists = exists & (places < tl.load(key_length_ptr + b))
    logits = tl.where(exists[None, :], logits, -float("inf"))
    peaks = tl.maximum(tl.max(logits, 1), LEAST)
    weights = tl.exp(logits - peaks[:, None])
    numerators = tl.dot(weights.to(value.dtype), value, input_precision="ieee")

    place = (head_of_batch * num_rows + rows) * blocks + block
    tl.store(
        numerators_ptr + place[:, None] * HEAD_DIM + dims[None, :],
        numerators,
        mask=is_row[:, None] & in_head[None, :],
    )
    size_of_sums = (tl.num_programs(1) * blocks).to(tl.int64) * num_rows
    tl.store(sums_ptr + place, tl.sum(weights, 1), mask=is_row)
    tl.store(sums_ptr + size_of_sums + place, peaks, mask=is_row)
    tl.store(sums_ptr + 2 * size_of_sums + place, tail, mask=is_row)
    size_of_means = (tl.num_programs(1) * blocks).to(tl.int64) * HEAD_DIM
    means_ptr += (head_of_batch * blocks + block) * HEAD_DIM
    tl.store(means_ptr + dims, tl.sum(key.to(tl.float32), 0) / size, mask=in_head)
    tl.store(means_ptr + size_of_means + dims, tl.sum(value.to(tl.float32), 0) / size, mask=in_head)

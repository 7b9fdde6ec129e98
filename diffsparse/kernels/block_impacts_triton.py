"""What skipping each key block would do to the output of each query, in Triton: both products and the sum in one pass.

It is held to PyTorch, in `strategies/block_impacts.py`.
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsparse.kernels.launch import FUSION, launch_on, step_of_heads

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
BLOCKS = 16
"""Key blocks that a program takes one after the other, since to read its queries and outputs takes longer than one."""
LARGEST_BLOCK = 1 << 15
"""Bytes of a key block, of which every GPU has room for what a program holds."""


def fits(dim: int, block_size: int, element_size: int) -> bool:
    """Whether the kernel takes keys of that many numbers, in blocks of that many tokens, and bytes a number."""
    padded_dim, padded_block = (triton.next_power_of_2(max(size, 16)) for size in (dim, block_size))
    return element_size <= 4 and padded_dim * padded_block * element_size <= LARGEST_BLOCK


def block_impacts(
    query: Tensor,
    output: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    *,
    scale: float,
    tail: bool,
    order: Tensor | None = None,
    key_length: Tensor | None = None,
) -> Tensor:
    """What `block_impacts.block_impacts` gives, [B, H, R, K] float32; products are in key's dtype.

    Keys and values are read in the `order` [H|1, S] without a copy of them.
    """
    batch, heads, rows, dim = query.shape
    tokens = key.shape[2]
    blocks = triton.cdiv(tokens, block_size)
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    order = None if order is None else order.contiguous()
    impacts = torch.empty((batch, heads, rows, blocks), dtype=torch.float32, device=key.device)
    chosen = compiled_for(
        rows,
        dim,
        block_size,
        key.element_size(),
        is_ordered=order is not None,
        takes_large_tiles=_takes_large_tiles(key.device),
    )
    programs = triton.cdiv(rows, chosen["ROWS"]) * triton.cdiv(blocks, BLOCKS)
    with launch_on(key.device):
        block_impacts_kernel[(programs, batch * heads)](
            query.contiguous(),
            output.contiguous(),
            key,
            value,
            order,
            None if key_length is None else key_length.contiguous(),
            impacts,
            *key.stride()[:3],
            *value.stride()[:3],
            step_of_heads(order),
            scale * LOG2_E,
            heads,
            rows,
            tokens,
            TAIL=tail,
            **chosen,
            **FUSION,
        )
    return impacts


def compiled_for(
    rows: int, dim: int, block_size: int, element_size: int, *, is_ordered: bool, takes_large_tiles: bool
) -> dict[str, int]:
    """What is compiled in, and `num_warps` and `num_stages`: the same whatever the number of tokens.

    All that a program holds in registers fits there, wherever it runs; a test compiles for all architectures.
    """
    padded_dim, padded_block = (triton.next_power_of_2(max(size, 16)) for size in (dim, block_size))
    tile = padded_dim * padded_block
    if element_size == 4:
        query_tile, num_warps, num_stages = 32 if tile <= 64 * 128 else 16, 8, 1
    elif tile <= 64 * 128:
        query_tile, num_warps = (128, 8) if rows > 64 and takes_large_tiles else (64, 4)
        # Two blocks are on their way while one is taken; their places in the order are read as much further ahead, or
        # what waits for them would stop the copies.
        num_stages = 5 if is_ordered else 3
    elif tile <= 128 * 128 and padded_block <= 128 and takes_large_tiles:
        query_tile, num_warps, num_stages = 64, 8, 2
    else:
        query_tile, num_warps, num_stages = 32, 8, 1
    return {
        "HEAD_DIM": dim,
        "PADDED_DIM": padded_dim,
        "ROWS": query_tile,
        "BLOCK": block_size,
        "PADDED_BLOCK": padded_block,
        "BLOCKS": BLOCKS,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def _takes_large_tiles(device: torch.device) -> bool:
    """Whether it is a Hopper or data center Blackwell, which have shared memory and products for them."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


# How many tokens, queries and heads there are is not compiled in: another resolution compiles nothing.
@triton.jit(
    do_not_specialize=["order_stride_h", "heads", "num_rows", "num_tokens"],
    do_not_specialize_on_alignment=["order_ptr"],
)
def block_impacts_kernel(
    query_ptr,
    output_ptr,
    key_ptr,
    value_ptr,
    order_ptr,
    key_length_ptr,
    impacts_ptr,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    value_stride_b,
    value_stride_h,
    value_stride_s,
    order_stride_h,
    logit_scale,
    heads,
    num_rows,
    num_tokens,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Some queries of one head against some key blocks. `order_ptr` and `key_length_ptr` may be None."""
    # Programs side by side take the same key blocks, which all but the first find in the L2 cache.
    tiles = tl.cdiv(num_rows, ROWS)
    tile, first_block = tl.program_id(0) % tiles, tl.program_id(0) // tiles * BLOCKS
    num_blocks = tl.cdiv(num_tokens, BLOCK)
    head_of_batch = tl.program_id(1).to(tl.int64)
    b, h = head_of_batch // heads, head_of_batch % heads
    key_ptr += b * key_stride_b + h * key_stride_h
    value_ptr += b * value_stride_b + h * value_stride_h
    end = num_tokens
    if key_length_ptr is not None:
        end = tl.minimum(end, tl.load(key_length_ptr + b)).to(tl.int32)

    dims = tl.arange(0, PADDED_DIM)
    in_head = dims < HEAD_DIM
    rows = tile * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    # 64 bits: all rows together may have more blocks than 32 count, keys more numbers.
    row_of_all = head_of_batch * num_rows + rows
    offsets = row_of_all[:, None] * HEAD_DIM + dims[None, :]
    is_number = is_row[:, None] & in_head[None, :]
    # [ROWS, PADDED_DIM]
    query = tl.load(query_ptr + offsets, mask=is_number, other=0.0).to(tl.float32) * logit_scale
    query = query.to(key_ptr.dtype.element_ty)
    output = tl.load(output_ptr + offsets, mask=is_number, other=0.0).to(tl.float32)
    # [ROWS]
    impact_ptrs = impacts_ptr + row_of_all * num_blocks

    within = tl.arange(0, PADDED_BLOCK)
    for block in range(first_block, tl.minimum(first_block + BLOCKS, num_blocks)):
        # [PADDED_BLOCK]
        places = block * BLOCK + within
        exists = (within < BLOCK) & (places < end)
        tokens = places.to(tl.int64)
        if order_ptr is not None:
            tokens = tl.load(order_ptr + h * order_stride_h + places, mask=exists, other=0)
        mask = exists[:, None] & in_head[None, :]
        # [PADDED_BLOCK, PADDED_DIM]
        key = tl.load(key_ptr + tokens[:, None] * key_stride_s + dims[None, :], mask=mask, other=0.0)
        value = tl.load(value_ptr + tokens[:, None] * value_stride_s + dims[None, :], mask=mask, other=0.0)

        # [ROWS, PADDED_BLOCK], in base 2. Where keys are float32, products are three of tensor cores, nearly as exact.
        logits = tl.dot(query, key.T, input_precision="tf32x3")
        weights, peaks = weights_of(logits, exists, TAIL)
        # As the product takes them: what all values have in common is what the output has.
        weights = weights.to(value.dtype)
        # [ROWS, PADDED_DIM]
        moves = tl.dot(weights, value, input_precision="tf32x3")
        moves -= tl.sum(weights.to(tl.float32), 1)[:, None] * output
        impacts = (2 * peaks + tl.log2(tl.sum(moves * moves, 1))) * LN_2
        tl.store(impact_ptrs + block, impacts, mask=is_row)


@triton.jit
def weights_of(logits, exists, TAIL: tl.constexpr):
    """Weights [ROWS, PADDED_BLOCK] over that of the largest logit, less the mean key's where TAIL; and that logit."""
    # [ROWS]
    peaks = tl.max(tl.where(exists[None, :], logits, -float("inf")), 1)
    weights = tl.where(exists[None, :], tl.exp2(logits - peaks[:, None]), 0.0)
    if TAIL:
        # The logits of keys that do not exist are zero.
        means = tl.sum(logits, 1) / tl.maximum(tl.sum(exists.to(tl.float32), 0), 1.0)
        weights = tl.where(exists[None, :], weights - tl.exp2(means - peaks)[:, None], 0.0)
    return weights, peaks

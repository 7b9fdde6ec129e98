"""Block means in Triton, in any order of the tokens: each is read once from where it lies. A program a block.

It is held to PyTorch, in `pooling.py`.
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsparse.kernels.launch import FUSION, launch_on, step_of_heads

# Numbers taken at a time: as many tokens as have them. The size of a block is no constant.
NUMBERS = 4096


def block_means(x: Tensor, block_size: int, key_length: Tensor | None, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `pooling.block_means` gives, of x [B, H, S, D] that steps by one along the head dim."""
    batch, heads, num_tokens, head_dim = x.shape
    blocks = triton.cdiv(num_tokens, block_size)
    means = torch.empty((batch, heads, blocks, head_dim), dtype=torch.float32, device=x.device)
    token_counts = torch.empty((1 if key_length is None else batch, blocks), dtype=torch.int64, device=x.device)
    padded_dim = triton.next_power_of_2(head_dim)
    # The kernel steps through it by one.
    order = order if order is None or order.stride(1) == 1 else order.contiguous()
    with launch_on(x.device):
        block_means_kernel[(blocks, heads, batch)](
            x,
            order,
            None if key_length is None else key_length.to(x.device).contiguous(),
            means,
            token_counts,
            *x.stride()[:3],
            step_of_heads(order),
            num_tokens,
            block_size,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            ROWS=max(NUMBERS // padded_dim, 1),
            **FUSION,
        )
    return means, token_counts


# How many tokens there are is not compiled in: another resolution compiles nothing.
@triton.jit(do_not_specialize=["order_stride_h", "num_tokens"])
def block_means_kernel(
    x_ptr,
    order_ptr,
    key_length_ptr,
    means_ptr,
    token_counts_ptr,
    x_stride_b,
    x_stride_h,
    x_stride_s,
    order_stride_h,
    num_tokens,
    block_size,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The mean of one block of one head. `order_ptr` and `key_length_ptr` may be None."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    # 64 bits: a tensor may have more numbers than 32 count.
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    x_ptr += b * x_stride_b + h * x_stride_h
    begin = block * block_size
    end = tl.minimum(begin + block_size, num_tokens)
    if key_length_ptr is not None:
        end = tl.minimum(end, tl.load(key_length_ptr + b)).to(tl.int32)
    dims = tl.arange(0, PADDED_DIM)
    sums = tl.zeros([PADDED_DIM], tl.float32)
    for first in range(begin, end, ROWS):
        places = first + tl.arange(0, ROWS)
        exists = places < end
        tokens = places.to(tl.int64)
        if order_ptr is not None:
            tokens = tl.load(order_ptr + h * order_stride_h + places, mask=exists, other=0)
        mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
        # [ROWS, PADDED_DIM]
        rows = tl.load(x_ptr + tokens[:, None] * x_stride_s + dims[None, :], mask=mask, other=0.0)
        sums += tl.sum(rows.to(tl.float32), 0)
    num_in_block = tl.maximum(end - begin, 0)
    place = ((b * tl.num_programs(1) + h) * blocks + block) * HEAD_DIM
    tl.store(means_ptr + place + dims, sums / tl.maximum(num_in_block, 1), mask=dims < HEAD_DIM)
    # All heads have the same numbers; without key lengths all batch elements too.
    is_first = h == 0
    if key_length_ptr is None:
        is_first = is_first & (b == 0)
    tl.store(token_counts_ptr + b * blocks + block, num_in_block.to(tl.int64), mask=is_first)

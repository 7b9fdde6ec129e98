"""`reorder.py` in Triton: a row at a time, from where it is to where it goes."""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsparse.kernels.launch import FUSION, launch_on, step_of_heads

ROWS = 64


def gather_tokens(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of x [B, H, S, D] in the order [H|1, S] int64 of each head: [B, H, S, D] contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, order, out, scatters=False)
    return out


def scatter_tokens(x: Tensor, order: Tensor) -> Tensor:
    """What `gather_tokens` was given for x [B, H, S, D], as [B, S, H, D] in memory."""
    batch, heads, tokens, dim = x.shape
    out = torch.empty((batch, tokens, heads, dim), dtype=x.dtype, device=x.device).transpose(1, 2)
    _launch(x, order, out, scatters=True)
    return out


def _launch(x: Tensor, order: Tensor, out: Tensor, *, scatters: bool) -> None:
    batch, heads, tokens, dim = x.shape
    # The kernel steps through it by one.
    order = order if order.stride(1) == 1 else order.contiguous()
    with launch_on(x.device):
        reorder_kernel[(triton.cdiv(tokens, ROWS), batch * heads)](
            x,
            order,
            out,
            *x.stride()[:3],
            step_of_heads(order),
            *out.stride()[:3],
            heads,
            tokens,
            HEAD_DIM=dim,
            PADDED_DIM=triton.next_power_of_2(dim),
            ROWS=ROWS,
            SCATTERS=scatters,
            **FUSION,
        )


@triton.jit
def reorder_kernel(
    x_ptr,
    order_ptr,
    out_ptr,
    x_stride_b,
    x_stride_h,
    x_stride_s,
    order_stride_h,
    out_stride_b,
    out_stride_h,
    out_stride_s,
    heads,
    tokens,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SCATTERS: tl.constexpr,
):
    """ROWS places of one head: from the order to the place, or with SCATTERS from the place to the order."""
    head_of_batch = tl.program_id(1).to(tl.int64)
    b, h = head_of_batch // heads, head_of_batch % heads
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = places < tokens
    ordered = tl.load(order_ptr + h * order_stride_h + places, mask=exists, other=0)
    # 64 bits: a tensor may have more numbers than 32 count.
    source, target = (places.to(tl.int64), ordered) if SCATTERS else (ordered, places.to(tl.int64))
    dims = tl.arange(0, PADDED_DIM)[None, :]
    mask = exists[:, None] & (dims < HEAD_DIM)
    rows = tl.load(x_ptr + b * x_stride_b + h * x_stride_h + source[:, None] * x_stride_s + dims, mask=mask)
    tl.store(out_ptr + b * out_stride_b + h * out_stride_h + target[:, None] * out_stride_s + dims, rows, mask=mask)

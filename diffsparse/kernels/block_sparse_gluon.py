"""Block-sparse attention for Hopper, in Gluon: one warp copies tiles of keys and values, two warpgroups compute.

What `block_sparse_triton.py` computes, for the shapes that matter most and where its tensor cores would wait. The
division of labour and the overlap of softmax and matrix products are FlashAttention-3's (arXiv:2407.08608).

Here is what runs on the host. The kernel is in `hopper_kernel_gluon.py`, its parts in the other `hopper_*_gluon.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from diffsparse.kernels import block_sparse_triton
from diffsparse.kernels.hopper_kernel_gluon import attention_kernel
from diffsparse.kernels.hopper_lists_gluon import TILE
from diffsparse.kernels.hopper_tiles_gluon import descriptor_layout
from diffsparse.kernels.launch import FUSION, launch_on, outputs, step_of_heads
from diffsparse.kernels.operands_triton import Operands, prepared
from diffsparse.kernels.pooling import tail_logs
from diffsparse.kernels.quantization import of_key_mean
from diffsparse.kernels.schedule import heavy_first

# Before it Gluon starts warps of different work in another way, and cannot say how many there are.
OLDEST_TRITON = (3, 6)
LOG2_E = 1.4426950408889634
QUERY_BLOCK = 128
KEY_BLOCKS = (64, 128)
HEAD_DIMS = (64, 128)
# Tiles of keys and of values in shared memory at a time, by head dim and the bytes of a key's and a value's number.
# Quantized keys have an even number of them: means take the room of two.
STAGES = {(64, 2, 2): 6, (128, 2, 2): 3, (64, 1, 1): 8, (128, 1, 1): 4, (64, 1, 2): 6, (128, 1, 2): 2}
COMPUTED_HERE = ("native", "int8", "int8_fp8", "fp8")


def why_not(query: Tensor, query_block_size: int, key_block_size: int, precision: str = "native") -> str | None:
    """Why this backend cannot take such a query [B, H, S, D] in a precision; None if it can."""
    if query.device.type != "cuda":
        return f"it needs a CUDA GPU, not {query.device.type}"
    if torch.version.hip is not None:
        return "it does not run on ROCm"
    if torch.cuda.get_device_capability(query.device) != (9, 0):
        return "it needs compute capability 9.0 (Hopper)"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"it needs Triton {'.'.join(map(str, OLDEST_TRITON))} or newer, this is {triton.__version__}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {query.dtype}"
    if query.shape[3] not in HEAD_DIMS:
        return f"head dim {query.shape[3]} is none of {', '.join(map(str, HEAD_DIMS))}"
    if query_block_size != QUERY_BLOCK:
        return f"a query block of {query_block_size} tokens is not {QUERY_BLOCK}"
    if key_block_size not in KEY_BLOCKS:
        return f"a key block of {key_block_size} tokens is none of {', '.join(map(str, KEY_BLOCKS))}"
    return block_sparse_triton.why_not(query, query_block_size, key_block_size, precision)


def left_to(precision: str) -> str | None:
    """The backend that computes in a precision for this one; None where this one does."""
    return None if precision in COMPUTED_HERE else "triton"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_blocks: Tensor,
    counts: Tensor,
    *,
    query_block_size: int,
    key_block_size: int,
    key_length: Tensor | None,
    tail: Tensor | None,
    scale: float,
    return_lse: bool,
    precision: str = "native",
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    schedule: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output [B, H, S, D] in query's dtype, and the logsumexp [B, H, S] fp32 (empty if not asked for).

    What the kernel does not compute goes to the Triton kernel: scales that are not positive, and what `left_to` says.
    """
    if scale <= 0 or left_to(precision) is not None:
        return block_sparse_triton.attend(
            query,
            key,
            value,
            key_blocks,
            counts,
            query_block_size=query_block_size,
            key_block_size=key_block_size,
            key_length=key_length,
            tail=tail,
            scale=scale,
            return_lse=return_lse,
            precision=precision,
            query_order=query_order,
            key_order=key_order,
            schedule=schedule,
        )
    operands = prepared(
        query,
        key,
        value,
        precision,
        QUERY_BLOCK,
        key_block_size,
        key_length=key_length,
        query_order=query_order,
        key_order=key_order,
        pool=tail is not None,
        interleave=True,
    )
    if operands.value_scale is None and key_length is not None:
        # A weight of 0 does not help against what is not a number.
        beyond = torch.arange(key.shape[2], device=key.device) >= key_length[:, None]
        fill = Tensor.masked_fill if operands.value is value else Tensor.masked_fill_
        operands = replace(operands, value=fill(operands.value, beyond[:, None, :, None], 0.0))
    out, lse = launch(
        operands,
        key_blocks,
        counts,
        key_block_size=key_block_size,
        key_length=key_length,
        tail=tail,
        query_order=query_order,
        schedule=schedule,
        dtype=query.dtype,
        scale=scale,
        return_lse=return_lse,
    )
    if return_lse and operands.key_mean is not None:
        lse += scale * of_key_mean(query, operands.key_mean)
    return out, lse


def launch(
    operands: Operands,
    key_blocks: Tensor,
    counts: Tensor,
    *,
    key_block_size: int,
    key_length: Tensor | None,
    tail: Tensor | None,
    query_order: Tensor | None,
    schedule: Tensor | None,
    dtype: torch.dtype,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Run the kernel on what is prepared. `dtype` is that of the output and of the means."""
    query, key, value = operands.query, operands.key, operands.value
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    out, lse = outputs(query, dtype, return_lse)
    key_blocks, counts = key_blocks.expand(batch, heads, -1, -1), counts.expand(batch, heads, -1)
    logs = pooled_key = pooled_value = has_tail = None
    if tail is not None:
        # Whole tiles of them, and one at least that belongs to no block.
        num_padded = ((num_keys // key_block_size + 1) // TILE.value + 1) * TILE.value
        logs = tail_logs(key_blocks, counts, num_keys, key_block_size, key_length, num_padded)
        assert operands.key_means is not None
        assert operands.value_means is not None
        pooled_key, pooled_value = (
            _descriptor(x, TILE.value, head_dim) for x in (operands.key_means, operands.value_means)
        )
        has_tail = tail.expand(batch, heads).to(torch.int32, memory_format=torch.contiguous_format)
    value_tile = (key_block_size, head_dim) if operands.value_scale is None else (head_dim, key_block_size)
    with launch_on(query.device):
        attention_kernel[(counts.numel(),)](
            query,
            _descriptor(key, key_block_size, head_dim),
            _descriptor(value, *value_tile),
            out,
            pooled_key,
            pooled_value,
            lse if return_lse else None,
            key_blocks,
            counts,
            heavy_first(counts) if schedule is None else schedule,
            query_order,
            key_length,
            operands.query_scale,
            operands.key_scale,
            operands.value_scale,
            has_tail,
            logs,
            *query.stride()[:3],
            *out.stride()[:3],
            step_of_heads(query_order),
            *key_blocks.stride(),
            *counts.stride(),
            heads,
            num_queries,
            num_keys,
            scale * LOG2_E,
            HEAD_DIM=head_dim,
            KEY_BLOCK=key_block_size,
            STAGES=STAGES[head_dim, key.element_size(), value.element_size()],
            num_warps=4,
            # Numbers of INT8 are INT_OFFSET too large, which only the exact product takes away again.
            **FUSION,
        )
    return out, lse


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What the copy engine needs to take a tile of x [B, H, S, D] at a time: zeros beyond its end."""
    # Strides of sizes of 1 mean nothing, and may be any number.
    strides = [stride if size > 1 else x.shape[3] for size, stride in zip(x.shape[:3], x.stride())]
    steps = [stride * x.element_size() for stride in strides]
    if x.stride(3) != 1 or x.data_ptr() % 16 or any(step == 0 or step % 16 for step in steps):
        x = x.clone(memory_format=torch.contiguous_format)
        strides = list(x.stride()[:3])
    return TensorDescriptor(
        x, list(x.shape), [*strides, 1], [1, 1, rows, columns], descriptor_layout(x.element_size(), columns)
    )

"""Block-sparse attention by Triton: how the kernel is compiled, and its launch.

It is held to `block_sparse_eager.py`, which is the specification. The kernel is in `block_sparse_kernel_triton.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from diffsparse.kernels import amd, quantization
from diffsparse.kernels.block_sparse_kernel_triton import attention_kernel
from diffsparse.kernels.launch import FUSION, launch_on, outputs, step_of_heads
from diffsparse.kernels.operands_triton import prepared
from diffsparse.kernels.pooling import tail_logs
from diffsparse.kernels.schedule import heavy_first
from diffsparse.kernels.tuning import Tuning, tuning

LOG2_E = 1.4426950408889634
BLOCK_SIZES = (16, 32, 64, 128)
TAIL_COLUMNS = 64
FEWEST_KEYS_OF_8_BITS = 32
SMALLEST_SCALE = 1e-30
# Bytes that a program may use on every GPU from Ampere on.
LEAST_SHARED_MEMORY = 99 * 1024


def why_not(query: Tensor, query_block_size: int, key_block_size: int, precision: str = "native") -> str | None:
    """Why this backend cannot take such a query [B, H, S, D] in a precision; None if it can."""
    if query.device.type != "cuda":
        return f"it needs a CUDA GPU, not {query.device.type}"
    of_amd = amd.architecture(query.device)
    reason = _why_not_on_nvidia(query.device, precision) if of_amd is None else amd.why_not(of_amd, precision)
    if reason is not None:
        return reason
    if query.shape[3] > 256:
        return f"head dim {query.shape[3]} is above 256"
    for name, size in (("query", query_block_size), ("key", key_block_size)):
        if size not in BLOCK_SIZES:
            return f"a {name} block of {size} tokens is none of {', '.join(map(str, BLOCK_SIZES))}"
    if quantization.PRECISIONS[precision].values != "native" and key_block_size < FEWEST_KEYS_OF_8_BITS:
        return f"products of 8 bits take {FEWEST_KEYS_OF_8_BITS} keys at a time, and a key block has {key_block_size}"
    if precision != "native":
        return None
    row = padded(query.shape[3], precision) * query.dtype.itemsize
    if of_amd is not None:
        if row > amd.LARGEST_ROW:
            return f"head dim {query.shape[3]} in {query.dtype} does not fit in the shared memory of {of_amd}"
        return None
    # The query block, and the smallest tiles of keys and values that `tuning` chooses.
    least = (query_block_size + 2 * min(BLOCK_SIZES)) * row
    if least > LEAST_SHARED_MEMORY and least > _shared_memory(query.device):
        return (
            f"query blocks of {query_block_size} at head dim {query.shape[3]} in {query.dtype} take {least} bytes of "
            f"shared memory, and a program has {_shared_memory(query.device)}"
        )
    return None


def _why_not_on_nvidia(device: torch.device, precision: str) -> str | None:
    capability, formats = torch.cuda.get_device_capability(device), quantization.PRECISIONS[precision]
    if capability < (8, 0):
        return "it needs compute capability 8.0 (Ampere) or newer"
    if "fp8" in (formats.scores, formats.values) and capability < (8, 9):
        return f"{precision} needs compute capability 8.9 (Ada) or newer, which multiplies FP8"
    return None


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
    """The output [B, H, S, D] in query's dtype, and the logsumexp [B, H, S] fp32 (empty if not asked for)."""
    batch, heads, num_queries, head_dim = query.shape
    num_keys, num_blocks = key.shape[2], triton.cdiv(key.shape[2], key_block_size)
    if scale < 0:
        query, scale = -query, -scale
    out, lse = outputs(query, query.dtype, return_lse)
    key_blocks, counts = key_blocks.expand(batch, heads, -1, -1), counts.expand(batch, heads, -1)
    operands = prepared(
        query,
        key,
        value,
        precision,
        query_block_size,
        key_block_size,
        key_length=key_length,
        query_order=query_order,
        key_order=key_order,
        pool=tail is not None,
    )
    logs = has_tail = None
    if tail is not None:
        logs = tail_logs(key_blocks, counts, num_keys, key_block_size, key_length, num_blocks + 1)
        has_tail = tail.expand(batch, heads).to(torch.int32, memory_format=torch.contiguous_format)
    chosen = _tuning(query, query_block_size, key_block_size, precision)
    padded_dim = padded(head_dim, precision)
    keys, values = operands.key, operands.value
    descriptors = chosen.descriptors and _suits_descriptor(keys) and _suits_descriptor(values)
    if descriptors:
        keys = _descriptor(keys, [chosen.key_tile, padded_dim // (2 if keys.dtype == torch.uint8 else 1)])
        tile = [padded_dim, chosen.key_tile] if operands.value_scale is not None else [chosen.key_tile, padded_dim]
        values = _descriptor(values, tile)
    with launch_on(query.device):
        attention_kernel[(counts.numel(),)](
            operands.query,
            keys,
            values,
            out,
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
            operands.key_means,
            operands.value_means,
            *operands.query.stride()[:3],
            *operands.key.stride()[:3],
            *operands.value.stride()[:3],
            *out.stride()[:3],
            step_of_heads(query_order),
            *key_blocks.stride(),
            *counts.stride(),
            heads,
            num_queries,
            num_keys,
            num_blocks,
            max(scale, SMALLEST_SCALE) * LOG2_E,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            QUERY_BLOCK=query_block_size,
            KEY_BLOCK=key_block_size,
            KEY_TILE=chosen.key_tile,
            TAIL_TILE=min(chosen.key_tile, TAIL_COLUMNS),
            DESCRIPTORS=descriptors,
            VALUES=quantization.PRECISIONS[precision].values,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            **FUSION,
        )
    if return_lse and operands.key_mean is not None:
        lse += scale * quantization.of_key_mean(query, operands.key_mean)
    return out, lse


def _descriptor(x: Tensor, tile: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, *tile])


def _suits_descriptor(x: Tensor) -> bool:
    """Whether x [B, H, S, D] starts and steps by multiples of 16 bytes, never by none."""
    steps = [x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3])]
    return all(step > 0 and step % 16 == 0 for step in steps)


def _tuning(query: Tensor, query_block_size: int, key_block_size: int, precision: str) -> Tuning:
    padded_dim = padded(query.shape[3], precision)
    of_amd = amd.architecture(query.device)
    if of_amd is not None:
        return amd.tuning(of_amd, query_block_size, key_block_size, padded_dim, precision)
    capability, shared_memory = (8, 0), LEAST_SHARED_MEMORY  # where there is no GPU to ask
    if query.device.type == "cuda":
        capability, shared_memory = torch.cuda.get_device_capability(query.device), _shared_memory(query.device)
    return tuning(
        capability, shared_memory, query_block_size, key_block_size, padded_dim, precision, query.dtype.itemsize
    )


def _shared_memory(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)  # not all are declared in every release
    return int(properties.shared_memory_per_block_optin)


def padded(head_dim: int, precision: str) -> int:
    """The head dim as the matrix instructions want it: a power of two, of 32 bytes at least."""
    return triton.next_power_of_2(max(head_dim, 16 if precision == "native" else 32))

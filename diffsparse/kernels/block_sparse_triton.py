"""Block-sparse attention as one Triton kernel: online softmax over the listed key blocks, then over the pooled tail.

One program a query block. It is held to `block_sparse_eager.py`, which is the specification. The online softmax is
that of FlashAttention-2 (arXiv:2307.08691), in base 2 with the scale folded into the logits.
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsparse.kernels.pooling import block_means

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
BLOCK_SIZES = (16, 32, 64, 128)
TAIL_COLUMNS = 64


@dataclass(frozen=True)
class Tuning:
    """How the kernel is compiled.

    Attributes:
        key_tile: tokens of a key block taken at a time, at most.
        num_warps, num_stages: as in Triton; more stages take more shared memory.
    """

    key_tile: int
    num_warps: int
    num_stages: int


def tuning(query_block_size: int, head_dim: int, element_size: int, shared_memory: int) -> Tuning:
    """For a query block, a head dim, bytes an element, and bytes of shared memory that a program may use.

    Chosen by what fits into shared memory and registers, not by measured speed.
    """
    row = triton.next_power_of_2(max(head_dim, 16)) * element_size
    num_warps = 8 if query_block_size * row > 64 * 128 else 4
    for key_tile, num_stages in ((64, 3), (64, 2), (32, 2), (16, 2)):
        # The query block, and a key and a value tile for every stage.
        if (query_block_size + 2 * num_stages * key_tile) * row <= 0.8 * shared_memory:
            return Tuning(key_tile, num_warps, num_stages)
    return Tuning(16, num_warps, 1)


def why_not(query: Tensor, query_block_size: int, key_block_size: int) -> str | None:
    """Why this backend cannot take such a query [B, H, S, D]; None if it can."""
    if query.device.type != "cuda":
        return f"it needs a CUDA GPU, not {query.device.type}"
    if torch.version.hip is not None:
        return "it has not been tried on ROCm"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "it needs compute capability 8.0 (Ampere) or newer"
    if query.shape[3] > 256:
        return f"head dim {query.shape[3]} is above 256"
    for name, size in (("query", query_block_size), ("key", key_block_size)):
        if size not in BLOCK_SIZES:
            return f"a {name} block of {size} tokens is none of {', '.join(map(str, BLOCK_SIZES))}"
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
) -> tuple[Tensor, Tensor]:
    """The output [B, H, S, D] in query's dtype, and the logsumexp [B, H, S] fp32 (empty if not asked for)."""
    batch, heads, num_queries, head_dim = query.shape
    num_rows, num_blocks = counts.shape[2], triton.cdiv(key.shape[2], key_block_size)
    # The kernel steps by one along the head dim.
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, heads, num_queries) if return_lse else 0, dtype=torch.float32)
    key_blocks, counts = key_blocks.expand(batch, heads, -1, -1), counts.expand(batch, heads, -1)
    if tail is None:
        listed = pooled_key = pooled_value = has_tail = None
    else:
        listed = _listed(key_blocks, counts, num_blocks)
        pooled_key, pooled_value = (block_means(x, key_block_size, key_length)[0].to(query.dtype) for x in (key, value))
        has_tail = tail.expand(batch, heads).to(torch.int32, memory_format=torch.contiguous_format)
    chosen = tuning(query_block_size, head_dim, query.element_size(), _shared_memory(query.device))
    with _on(query.device):
        attention_kernel[(num_rows, batch * heads)](
            query,
            key,
            value,
            out,
            lse if return_lse else None,
            key_blocks,
            counts,
            key_length,
            has_tail,
            listed,
            pooled_key,
            pooled_value,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *key_blocks.stride(),
            *counts.stride(),
            heads,
            num_queries,
            key.shape[2],
            num_blocks,
            scale * LOG2_E.value,
            HEAD_DIM=head_dim,
            PADDED_DIM=triton.next_power_of_2(max(head_dim, 16)),
            QUERY_BLOCK=query_block_size,
            KEY_BLOCK=key_block_size,
            KEY_TILE=min(chosen.key_tile, key_block_size),
            TAIL_TILE=min(chosen.key_tile, TAIL_COLUMNS),
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )
    return out, lse


@triton.jit
def attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    key_blocks_ptr,
    counts_ptr,
    key_length_ptr,
    has_tail_ptr,
    listed_ptr,
    pooled_key_ptr,
    pooled_value_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    value_stride_b,
    value_stride_h,
    value_stride_s,
    lists_stride_b,
    lists_stride_h,
    lists_stride_q,
    lists_stride_c,
    counts_stride_b,
    counts_stride_h,
    counts_stride_q,
    heads,
    num_queries,
    num_keys,
    num_blocks,
    logit_scale,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_TILE: tl.constexpr,
    TAIL_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One query block of one head. The optional pointers are None where there is nothing to point to."""
    row = tl.program_id(0)
    head_of_batch = tl.program_id(1).to(tl.int64)
    b, h = head_of_batch // heads, head_of_batch % heads
    query_ptr += b * query_stride_b + h * query_stride_h
    key_ptr += b * key_stride_b + h * key_stride_h
    value_ptr += b * value_stride_b + h * value_stride_h
    length = num_keys
    if key_length_ptr is not None:
        length = tl.minimum(tl.load(key_length_ptr + b), num_keys)

    first_query = row * QUERY_BLOCK
    query_ptr += first_query.to(tl.int64) * query_stride_s
    # [QUERY_BLOCK, PADDED_DIM]
    query = _load_rows(query_ptr, num_queries - first_query, query_stride_s, QUERY_BLOCK, HEAD_DIM, PADDED_DIM)
    peak = tl.full([QUERY_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([QUERY_BLOCK], tl.float32)
    numerator = tl.zeros([QUERY_BLOCK, PADDED_DIM], tl.float32)

    TILES: tl.constexpr = KEY_BLOCK // KEY_TILE
    count = tl.load(counts_ptr + b * counts_stride_b + h * counts_stride_h + row * counts_stride_q)
    lists_ptr = key_blocks_ptr + b * lists_stride_b + h * lists_stride_h + row * lists_stride_q
    for i in range(count * TILES):
        block = tl.load(lists_ptr + (i // TILES) * lists_stride_c)
        first_key = block * KEY_BLOCK + (i % TILES) * KEY_TILE
        # Only where a tile starts needs 64 bits; offsets within it cost half the registers.
        key_tile_ptr = key_ptr + first_key.to(tl.int64) * key_stride_s
        value_tile_ptr = value_ptr + first_key.to(tl.int64) * value_stride_s
        # [KEY_TILE, PADDED_DIM]
        key = _load_rows(key_tile_ptr, length - first_key, key_stride_s, KEY_TILE, HEAD_DIM, PADDED_DIM)
        value = _load_rows(value_tile_ptr, length - first_key, value_stride_s, KEY_TILE, HEAD_DIM, PADDED_DIM)
        # [QUERY_BLOCK, KEY_TILE]
        logits = tl.dot(query, key.T, input_precision=PRECISION) * logit_scale
        exists = tl.arange(0, KEY_TILE) < length - first_key
        logits = tl.where(exists[None, :], logits, -float("inf"))
        peak, total, numerator = _online_softmax_update(peak, total, numerator, logits, value, PRECISION)

    if has_tail_ptr is not None:
        num_means = tl.where(tl.load(has_tail_ptr + head_of_batch) != 0, num_blocks, 0)
        listed_ptr += (head_of_batch * tl.num_programs(0) + row) * num_blocks
        pooled_key_ptr += head_of_batch * num_blocks * HEAD_DIM
        pooled_value_ptr += head_of_batch * num_blocks * HEAD_DIM
        for first in range(0, num_means, TAIL_TILE):
            remaining = num_blocks - first
            key_tile_ptr, value_tile_ptr = pooled_key_ptr + first * HEAD_DIM, pooled_value_ptr + first * HEAD_DIM
            # [TAIL_TILE, PADDED_DIM]
            key = _load_rows(key_tile_ptr, remaining, HEAD_DIM, TAIL_TILE, HEAD_DIM, PADDED_DIM)
            value = _load_rows(value_tile_ptr, remaining, HEAD_DIM, TAIL_TILE, HEAD_DIM, PADDED_DIM)
            means = first + tl.arange(0, TAIL_TILE)
            is_listed = tl.load(listed_ptr + means, mask=means < num_blocks, other=1)
            size = tl.minimum(tl.maximum(length - means * KEY_BLOCK, 0), KEY_BLOCK).to(tl.float32)
            logits = tl.dot(query, key.T, input_precision=PRECISION) * logit_scale + tl.log2(size)[None, :]
            logits = tl.where(((is_listed == 0) & (size > 0))[None, :], logits, -float("inf"))
            peak, total, numerator = _online_softmax_update(peak, total, numerator, logits, value, PRECISION)

    sees_some = total > 0
    total = tl.where(sees_some, total, 1.0)
    out = tl.where(sees_some[:, None], numerator / total[:, None], 0.0)
    rows, dims = tl.arange(0, QUERY_BLOCK), tl.arange(0, PADDED_DIM)
    exists = rows < num_queries - first_query
    first_row = head_of_batch * num_queries + first_query
    tl.store(
        out_ptr + first_row * HEAD_DIM + rows[:, None] * HEAD_DIM + dims[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=exists[:, None] & (dims < HEAD_DIM)[None, :],
    )
    if lse_ptr is not None:
        lse = tl.where(sees_some, (peak + tl.log2(total)) * LN_2, -float("inf"))
        tl.store(lse_ptr + first_row + rows, lse, mask=exists)


@triton.jit
def _load_rows(ptr, num_rows, stride, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Rows [ROWS, PADDED_DIM] from `ptr` on, zeros from `num_rows` on and beyond the head dim."""
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED_DIM)[None, :]
    mask = rows < num_rows
    if HEAD_DIM != PADDED_DIM:
        mask = mask & (dims < HEAD_DIM)
    return tl.load(ptr + rows * stride + dims, mask=mask, other=0.0)


@triton.jit
def _online_softmax_update(peak, total, numerator, logits, value, PRECISION: tl.constexpr):
    """Take logits [n, k], in base 2, and value [k, D] into the sums of a softmax."""
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    # Before anything is seen the peak is -inf, and -inf - -inf is not a number.
    shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weights = tl.exp2(logits - shift[:, None])
    fade = tl.exp2(peak - shift)
    total = total * fade + tl.sum(weights, 1)
    numerator = tl.dot(weights.to(value.dtype), value, numerator * fade[:, None], input_precision=PRECISION)
    return new_peak, total, numerator


def _listed(key_blocks: Tensor, counts: Tensor, num_blocks: int) -> Tensor:
    """[B, H, Q, K] uint8, 1 where a block is listed."""
    is_listed = torch.arange(key_blocks.shape[-1], device=counts.device) < counts[..., None]
    # Entries beyond a count go to a column of their own, which is cut off.
    index = key_blocks.where(is_listed, num_blocks).long()
    listed = torch.zeros((*counts.shape, num_blocks + 1), dtype=torch.uint8, device=counts.device)
    return listed.scatter_(-1, index, 1)[..., :num_blocks].contiguous()


def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may use; what every supported GPU has where there is none to ask."""
    if device.type != "cuda":
        return 99 * 1024
    properties: Any = torch.cuda.get_device_properties(device)  # not all of them are declared in every release
    return int(properties.shared_memory_per_block_optin)


def _on(device: torch.device) -> torch.cuda.device:
    """Launches go to the current device: make it the tensors' own. Nothing on the CPU, for the interpreter."""
    return torch.cuda.device(device if device.type == "cuda" else -1)

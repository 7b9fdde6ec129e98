"""Block-sparse attention as one Triton kernel: online softmax over the listed key blocks, then over the pooled tail.

One program a query block. It is held to `block_sparse_eager.py`, which is the specification. The online softmax is
that of FlashAttention-2 (arXiv:2307.08691), in base 2 with the scale folded into the exponent. Keys and values come
through the tensor memory accelerator where `tuning.py` says that it pays, by pointers elsewhere.
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
from triton.tools.tensor_descriptor import TensorDescriptor

from diffsparse.kernels import quantization
from diffsparse.kernels.pooling import block_means
from diffsparse.kernels.quantization_triton import quantize_blocks, quantize_values
from diffsparse.kernels.tuning import Tuning, tuning

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
BLOCK_SIZES = (16, 32, 64, 128)
TAIL_COLUMNS = 64
FEWEST_FP8_KEYS = 32
SMALLEST_SCALE = 1e-30
LIST_CHUNK = tl.constexpr(128)
# Weights, at most 1, are taken times 2 ** 8 before they are rounded to FP8, whose largest number is 448.
FP8_BOOST = tl.constexpr(8.0)


def why_not(query: Tensor, query_block_size: int, key_block_size: int, precision: str = "native") -> str | None:
    """Why this backend cannot take such a query [B, H, S, D] in a precision; None if it can."""
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
    formats = quantization.PRECISIONS[precision]
    if "fp8" in (formats.scores, formats.values) and torch.cuda.get_device_capability(query.device) < (8, 9):
        return f"{precision} needs compute capability 8.9 (Ada) or newer, which multiplies FP8"
    if formats.values == "fp8" and key_block_size < FEWEST_FP8_KEYS:
        return f"FP8 products take {FEWEST_FP8_KEYS} keys at a time, and a key block has {key_block_size}"
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
) -> tuple[Tensor, Tensor]:
    """The output [B, H, S, D] in query's dtype, and the logsumexp [B, H, S] fp32 (empty if not asked for)."""
    batch, heads, num_queries, head_dim = query.shape
    num_keys, num_blocks = key.shape[2], triton.cdiv(key.shape[2], key_block_size)
    if scale < 0:
        query, scale = -query, -scale
    # The kernel steps by one along the head dim.
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, heads, num_queries) if return_lse else 0, dtype=torch.float32)
    key_blocks, counts = key_blocks.expand(batch, heads, -1, -1), counts.expand(batch, heads, -1)
    operands = _operands(query, key, value, precision, query_block_size, key_block_size, key_length)
    if tail is None:
        listed = pooled_key = pooled_value = has_tail = None
    else:
        listed = _listed(key_blocks, counts, num_blocks)
        pooled_key, pooled_value = (block_means(x, key_block_size, key_length)[0] for x in (key, value))
        if operands.key_mean is not None:
            pooled_key -= operands.key_mean
        pooled_key, pooled_value = pooled_key.to(query.dtype), pooled_value.to(query.dtype)
        has_tail = tail.expand(batch, heads).to(torch.int32, memory_format=torch.contiguous_format)
    chosen = _tuning(query, query_block_size, key_block_size, precision)
    padded_dim = padded(head_dim, precision)
    keys, values = operands.key, operands.value
    descriptors = chosen.descriptors and _suits_descriptor(keys) and _suits_descriptor(values)
    if descriptors:
        keys = _descriptor(keys, [chosen.key_tile, padded_dim // (2 if keys.dtype == torch.uint8 else 1)])
        tile = [padded_dim, chosen.key_tile] if operands.value_scale is not None else [chosen.key_tile, padded_dim]
        values = _descriptor(values, tile)
    with _on(query.device):
        attention_kernel[(counts.shape[2], batch * heads)](
            operands.query,
            keys,
            values,
            out,
            lse if return_lse else None,
            key_blocks,
            counts,
            key_length,
            operands.query_scale,
            operands.key_scale,
            operands.value_scale,
            has_tail,
            listed,
            pooled_key,
            pooled_value,
            *operands.query.stride()[:3],
            *operands.key.stride()[:3],
            *operands.value.stride()[:3],
            *key_blocks.stride(),
            *counts.stride(),
            heads,
            num_queries,
            num_keys,
            num_blocks,
            max(scale, SMALLEST_SCALE) * LOG2_E.value,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            QUERY_BLOCK=query_block_size,
            KEY_BLOCK=key_block_size,
            KEY_TILE=chosen.key_tile,
            TAIL_TILE=min(chosen.key_tile, TAIL_COLUMNS),
            DESCRIPTORS=descriptors,
            FP8_VALUES=operands.value_scale is not None,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )
    if return_lse and operands.key_mean is not None:
        lse += scale * (query.float() @ operands.key_mean.mT)[..., 0]
    return out, lse


@dataclass(frozen=True, eq=False)
class _Operands:
    """What the kernel multiplies: query and key [B, H, S, D], in INT4 [B, H, S, ceil(D / 2)] as `pack_int4` packs them.

    Value is [B, H, S, D], or in FP8 [B, H, D, S'].

    The scales and `key_mean` are those of `quantization.py`, None where nothing is quantized.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_scale: Tensor | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    key_mean: Tensor | None = None


def _operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    precision: str,
    query_block_size: int,
    key_block_size: int,
    key_length: Tensor | None,
) -> _Operands:
    if precision == "native":
        return _Operands(query, key, value)
    formats = quantization.PRECISIONS[precision]
    mean = quantization.key_mean(key, key_length)
    query, query_scale, _ = quantize_blocks(query, query_block_size, formats.scores)
    key, key_scale, _ = quantize_blocks(key, key_block_size, formats.scores, mean=mean, key_length=key_length)
    value_scale = None
    if formats.values == "fp8":
        value, value_scale, _ = quantize_values(value, key_block_size, key_length=key_length)
    return _Operands(query, key, value, query_scale, key_scale, value_scale, mean)


@triton.jit
def attention_kernel(
    query_ptr,
    keys,
    values,
    out_ptr,
    lse_ptr,
    key_blocks_ptr,
    counts_ptr,
    key_length_ptr,
    query_scale_ptr,
    key_scale_ptr,
    value_scale_ptr,
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
    value_stride,
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
    DESCRIPTORS: tl.constexpr,
    FP8_VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One query block of one head. The optional pointers are None where there is nothing to point to.

    `keys` and `values` are descriptors or pointers. Values in FP8 lie transposed, [B, H, D, S], as the matrix
    instructions want them. The scales of query and key are per block, [B, H, blocks]; that of value is [B, H, D].
    """
    row = tl.program_id(0)
    head_of_batch = tl.program_id(1).to(tl.int64)
    b, h = head_of_batch // heads, head_of_batch % heads
    if not DESCRIPTORS:
        keys += b * key_stride_b + h * key_stride_h
        values += b * value_stride_b + h * value_stride_h
    length = num_keys
    if key_length_ptr is not None:
        length = tl.minimum(tl.load(key_length_ptr + b), num_keys)

    first_query = row * QUERY_BLOCK
    query_ptr += b * query_stride_b + h * query_stride_h + first_query.to(tl.int64) * query_stride_s
    PACKED: tl.constexpr = query_ptr.dtype.element_ty == tl.uint8
    # [QUERY_BLOCK, PADDED_DIM]
    if PACKED:
        query = _load_packed(query_ptr, num_queries - first_query, query_stride_s, QUERY_BLOCK, HEAD_DIM, PADDED_DIM)
    else:
        query = _load_rows(query_ptr, num_queries - first_query, query_stride_s, QUERY_BLOCK, HEAD_DIM, PADDED_DIM)
    query_scale = logit_scale
    if query_scale_ptr is not None:
        query_scale *= tl.load(query_scale_ptr + head_of_batch * tl.num_programs(0) + row)
        key_scale_ptr += head_of_batch * num_blocks
    peak = tl.full([QUERY_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([QUERY_BLOCK], tl.float32)
    numerator = tl.zeros([QUERY_BLOCK, PADDED_DIM], tl.float32)

    TILES: tl.constexpr = KEY_BLOCK // KEY_TILE
    count = tl.load(counts_ptr + b * counts_stride_b + h * counts_stride_h + row * counts_stride_q)
    lists_ptr = key_blocks_ptr + b * lists_stride_b + h * lists_stride_h + row * lists_stride_q
    # Where all keys exist, only a ragged last block needs a mask: it is taken first, and the others without one.
    MASKED: tl.constexpr = key_length_ptr is not None
    skipped = count
    if not MASKED:
        last = num_keys // KEY_BLOCK
        skipped = _find(lists_ptr, lists_stride_c, count, last)
        if skipped < count:
            scale = query_scale
            if key_scale_ptr is not None:
                scale *= tl.load(key_scale_ptr + last)
            for tile in range(TILES):
                peak, total, numerator = _take_tile(
                    query,
                    keys,
                    values,
                    b,
                    h,
                    last * KEY_BLOCK + tile * KEY_TILE,
                    length,
                    key_stride_s,
                    value_stride,
                    scale,
                    peak,
                    total,
                    numerator,
                    KEY_TILE,
                    HEAD_DIM,
                    PADDED_DIM,
                    DESCRIPTORS,
                    PACKED,
                    True,
                    FP8_VALUES,
                    PRECISION,
                )
    num_others = count - (skipped < count).to(tl.int32)
    # The next entry is read a tile ahead: what waits for it would stop the copies of keys and values.
    block, key_scale = _entry(lists_ptr, lists_stride_c, key_scale_ptr, 0, skipped, count)
    for i in range(num_others * TILES):
        first_key = block * KEY_BLOCK + (i % TILES) * KEY_TILE
        scale = query_scale * key_scale
        block, key_scale = _entry(lists_ptr, lists_stride_c, key_scale_ptr, (i + 1) // TILES, skipped, count)
        peak, total, numerator = _take_tile(
            query,
            keys,
            values,
            b,
            h,
            first_key,
            length,
            key_stride_s,
            value_stride,
            scale,
            peak,
            total,
            numerator,
            KEY_TILE,
            HEAD_DIM,
            PADDED_DIM,
            DESCRIPTORS,
            PACKED,
            MASKED,
            FP8_VALUES,
            PRECISION,
        )
    if FP8_VALUES:
        dims = tl.arange(0, PADDED_DIM)
        value_scale = tl.load(value_scale_ptr + head_of_batch * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        numerator *= value_scale[None, :]

    if has_tail_ptr is not None:
        if query_scale_ptr is not None:
            # Means are not quantized, and meet the query that the listed keys have met.
            query = (query.to(tl.float32) * (query_scale / logit_scale)).to(pooled_key_ptr.dtype.element_ty)
        num_means = tl.where(tl.load(has_tail_ptr + head_of_batch) != 0, num_blocks, 0)
        listed_ptr += (head_of_batch * tl.num_programs(0) + row) * num_blocks
        pooled_key_ptr += head_of_batch * num_blocks * HEAD_DIM
        pooled_value_ptr += head_of_batch * num_blocks * HEAD_DIM
        for first in range(0, num_means, TAIL_TILE):
            remaining = num_blocks - first
            key_tile_ptr, value_tile_ptr = pooled_key_ptr + first * HEAD_DIM, pooled_value_ptr + first * HEAD_DIM
            # [TAIL_TILE, PADDED_DIM]
            if PACKED:
                key = _load_in_halves(key_tile_ptr, remaining, TAIL_TILE, HEAD_DIM, PADDED_DIM)
            else:
                key = _load_rows(key_tile_ptr, remaining, HEAD_DIM, TAIL_TILE, HEAD_DIM, PADDED_DIM)
            value = _load_rows(value_tile_ptr, remaining, HEAD_DIM, TAIL_TILE, HEAD_DIM, PADDED_DIM)
            means = first + tl.arange(0, TAIL_TILE)
            is_listed = tl.load(listed_ptr + means, mask=means < num_blocks, other=1)
            size = tl.minimum(tl.maximum(length - means * KEY_BLOCK, 0), KEY_BLOCK).to(tl.float32)
            logits = tl.dot(query, key.T, input_precision=PRECISION) * logit_scale + tl.log2(size)[None, :]
            logits = tl.where(((is_listed == 0) & (size > 0))[None, :], logits, -float("inf"))
            peak, fade, weights = _online_softmax(peak, logits, 1.0, True, FP8_VALUES)
            total = total * fade + tl.sum(weights, 1)
            numerator = tl.dot(weights.to(value.dtype), value, numerator * fade[:, None], input_precision=PRECISION)

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
        boost: tl.constexpr = FP8_BOOST if FP8_VALUES else 0.0
        lse = tl.where(sees_some, (peak + tl.log2(total) - boost) * LN_2, -float("inf"))
        tl.store(lse_ptr + first_row + rows, lse, mask=exists)


@triton.jit
def _take_tile(
    query,
    keys,
    values,
    b,
    h,
    first_key,
    length,
    key_stride_s,
    value_stride,
    scale,
    peak,
    total,
    numerator,
    KEY_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    FP8_VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take KEY_TILE keys from `first_key` on into the sums of a softmax; with MASKED only those before `length`."""
    exists = tl.arange(0, KEY_TILE) < length - first_key
    # [KEY_TILE, PADDED_DIM]
    if DESCRIPTORS:
        key = keys.load([b.to(tl.int32), h.to(tl.int32), first_key, 0])
        key = _unpacked(key.reshape(KEY_TILE, PADDED_DIM // 2)) if PACKED else key.reshape(KEY_TILE, PADDED_DIM)
    else:
        # Only where a tile starts needs 64 bits; offsets within it cost half the registers.
        tile_ptr = keys + first_key.to(tl.int64) * key_stride_s
        remaining = length - first_key if MASKED else KEY_TILE
        if PACKED:
            key = _load_packed(tile_ptr, remaining, key_stride_s, KEY_TILE, HEAD_DIM, PADDED_DIM, MASKED)
        else:
            key = _load_rows(tile_ptr, remaining, key_stride_s, KEY_TILE, HEAD_DIM, PADDED_DIM, MASKED)
    # [QUERY_BLOCK, KEY_TILE]
    if key.dtype == tl.int8:
        logits = tl.dot(query, key.T).to(tl.float32)
    else:
        logits = tl.dot(query, key.T, input_precision=PRECISION)
    if MASKED:
        logits = tl.where(exists[None, :], logits, -float("inf"))
    peak, fade, weights = _online_softmax(peak, logits, scale, MASKED, FP8_VALUES)
    total = total * fade + tl.sum(weights, 1)
    numerator *= fade[:, None]
    if FP8_VALUES:
        # [PADDED_DIM, KEY_TILE]; what lies beyond the length is zero.
        if DESCRIPTORS:
            value = values.load([b.to(tl.int32), h.to(tl.int32), 0, first_key]).reshape(PADDED_DIM, KEY_TILE)
        else:
            dims = tl.arange(0, PADDED_DIM)[:, None]
            value_ptr = values + first_key + dims * value_stride + tl.arange(0, KEY_TILE)[None, :]
            value = tl.load(value_ptr, mask=(dims < HEAD_DIM) & exists[None, :], other=0.0)
        # The tensor cores of Hopper keep sums of FP8 products to 14 bits: they go into fp32 after every tile.
        numerator = tl.dot(weights.to(value.dtype), value.T, numerator, max_num_imprecise_acc=KEY_TILE)
    else:
        if DESCRIPTORS:
            value = values.load([b.to(tl.int32), h.to(tl.int32), first_key, 0]).reshape(KEY_TILE, PADDED_DIM)
            if MASKED:
                value = tl.where(exists[:, None], value, 0.0)
        else:
            tile_ptr = values + first_key.to(tl.int64) * value_stride
            remaining = length - first_key if MASKED else KEY_TILE
            value = _load_rows(tile_ptr, remaining, value_stride, KEY_TILE, HEAD_DIM, PADDED_DIM, MASKED)
        numerator = tl.dot(weights.to(value.dtype), value, numerator, input_precision=PRECISION)
    return peak, total, numerator


@triton.jit
def _online_softmax(peak, logits, scale, MASKED: tl.constexpr, FP8_VALUES: tl.constexpr):
    """The new peak of `scale` x logits [n, k], in base 2, what older sums shrink by, and the weights [n, k]."""
    new_peak = tl.maximum(peak, tl.max(logits, 1) * scale)
    shift = new_peak
    if MASKED:
        # Before anything is seen the peak is -inf, and -inf - -inf is not a number.
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    fade = tl.exp2(peak - shift)
    if FP8_VALUES:
        shift -= FP8_BOOST
    return new_peak, fade, tl.exp2(logits * scale - shift[:, None])


@triton.jit
def _find(lists_ptr, stride, count, block):
    """The place of `block` among the first `count` entries of a list; `count` if it is not there."""
    place = count
    for first in range(0, count, LIST_CHUNK):
        entries = first + tl.arange(0, LIST_CHUNK)
        found = tl.load(lists_ptr + entries * stride, mask=entries < count, other=-1) == block
        place = tl.minimum(place, tl.min(tl.where(found, entries, count), 0))
    return place


@triton.jit
def _entry(lists_ptr, stride, key_scale_ptr, i, skipped, count):
    """Entry i of a list without the entry at `skipped`, and the scale of that block's keys; 0 from `count` on."""
    i += (i >= skipped).to(tl.int32)
    block = tl.load(lists_ptr + i * stride, mask=i < count, other=0)
    scale = 1.0
    if key_scale_ptr is not None:
        scale = tl.load(key_scale_ptr + block)
    return block, scale


@triton.jit
def _load_rows(
    ptr,
    num_rows,
    stride,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    MASKED: tl.constexpr = True,
):
    """Rows [ROWS, PADDED_DIM] from `ptr` on, zeros beyond the head dim, and with MASKED from `num_rows` on."""
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED_DIM)[None, :]
    if MASKED and HEAD_DIM != PADDED_DIM:
        rows_of_it = tl.load(ptr + rows * stride + dims, mask=(rows < num_rows) & (dims < HEAD_DIM), other=0.0)
    elif MASKED:
        rows_of_it = tl.load(ptr + rows * stride + dims, mask=rows < num_rows, other=0.0)
    elif HEAD_DIM != PADDED_DIM:
        rows_of_it = tl.load(ptr + rows * stride + dims, mask=dims < HEAD_DIM, other=0.0)
    else:
        rows_of_it = tl.load(ptr + rows * stride + dims)
    return rows_of_it


@triton.jit
def _load_packed(
    ptr,
    num_rows,
    stride,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    MASKED: tl.constexpr = True,
):
    """The same of rows of INT4, two a byte."""
    return _unpacked(_load_rows(ptr, num_rows, stride, ROWS, (HEAD_DIM + 1) // 2, PADDED_DIM // 2, MASKED))


@triton.jit
def _unpacked(packed):
    """INT4 two a byte [n, w] as int8 [n, 2 w]. Queries and keys alike: any order of their dims gives the same product.

    The two of a byte stay next to each other, so that no number goes to another thread.
    """
    lower = (packed << 4).to(tl.int8, bitcast=True) >> 4
    upper = packed.to(tl.int8, bitcast=True) >> 4
    return tl.join(lower, upper).reshape(packed.shape[0], 2 * packed.shape[1])


@triton.jit
def _load_in_halves(ptr, num_rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Contiguous rows [ROWS, PADDED_DIM] of numbers that are not packed, their dims in the order of `_unpacked`."""
    WIDTH: tl.constexpr = (HEAD_DIM + 1) // 2
    rows, places = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED_DIM)[None, :]
    dims = places % 2 * WIDTH + places // 2
    mask = (rows < num_rows) & (places // 2 < WIDTH) & (dims < HEAD_DIM)
    return tl.load(ptr + rows * HEAD_DIM + dims, mask=mask, other=0.0)


def _descriptor(x: Tensor, tile: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, *tile])


def _suits_descriptor(x: Tensor) -> bool:
    """Whether x [B, H, S, D] starts and steps by multiples of 16 bytes, never by none."""
    steps = [x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3])]
    return all(step > 0 and step % 16 == 0 for step in steps)


def _listed(key_blocks: Tensor, counts: Tensor, num_blocks: int) -> Tensor:
    """[B, H, Q, K] uint8, 1 where a block is listed."""
    is_listed = torch.arange(key_blocks.shape[-1], device=counts.device) < counts[..., None]
    # Entries beyond a count go to a column of their own, which is cut off.
    index = key_blocks.where(is_listed, num_blocks).long()
    listed = torch.zeros((*counts.shape, num_blocks + 1), dtype=torch.uint8, device=counts.device)
    return listed.scatter_(-1, index, 1)[..., :num_blocks].contiguous()


def _tuning(query: Tensor, query_block_size: int, key_block_size: int, precision: str) -> Tuning:
    capability, shared_memory = (8, 0), 99 * 1024  # where there is no GPU to ask
    if query.device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(query.device)  # not all are declared in every release
        capability = (properties.major, properties.minor)
        shared_memory = int(properties.shared_memory_per_block_optin)
    padded_dim = padded(query.shape[3], precision)
    return tuning(
        capability, shared_memory, query_block_size, key_block_size, padded_dim, precision, query.element_size()
    )


def padded(head_dim: int, precision: str) -> int:
    """The head dim as the matrix instructions want it: a power of two, of 32 bytes at least."""
    return triton.next_power_of_2(max(head_dim, 16 if precision == "native" else 32))


def _on(device: torch.device) -> torch.cuda.device:
    """Launches go to the current device: make it the tensors' own. Nothing on the CPU, for the interpreter."""
    return torch.cuda.device(device if device.type == "cuda" else -1)

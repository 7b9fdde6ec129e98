"""Block-sparse attention for Hopper, in Gluon: one warp copies tiles of keys and values, two warpgroups compute.

What `block_sparse_triton.py` computes, for the shapes that matter most and where its tensor cores would wait. The
division of labour and the overlap of softmax and matrix products are FlashAttention-3's (arXiv:2407.08608).
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from diffsparse.kernels import block_sparse_triton
from diffsparse.kernels.pooling import block_means, tail_sizes

LOG2_E = 1.4426950408889634
LN_2 = gl.constexpr(0.6931471805599453)
QUERY_BLOCK = 128
KEY_BLOCKS = (64, 128)
HEAD_DIMS = (64, 128)
# Tiles of keys and of values in shared memory at a time, by head dim and the bytes of a key's and a value's number.
# Quantized keys have an even number of them: means take the room of two.
STAGES = {(64, 2, 2): 6, (128, 2, 2): 3, (64, 1, 1): 8, (128, 1, 1): 4, (64, 1, 2): 6, (128, 1, 2): 2}
# A warpgroup multiplies 64 rows at a time: two of them share a query block.
ROWS = gl.constexpr(64)
# The least a row's largest logit is taken for, in base 2: -inf - -inf, where nothing is seen, is not a number.
NO_PEAK = gl.constexpr(-1e30)
# Keys taken at a time: one key block or two.
TILE = gl.constexpr(128)
# Whether it computes in INT8 and FP8. It did on an H200, right and at 800 TFLOP/s, in some 200 calls. But two of two
# processes that shared the GPU with fourteen others died of «operation not supported on global/shared address space» at
# their first call, and why is not known. Until it is, the Triton kernel takes these calls.
QUANTIZES = False
# FP8 weights are taken times 2 ** 8: `quantization.py`, WEIGHT_SCALE.
FP8_BOOST = gl.constexpr(8.0)
# Sums of INT8 products start here: their bits are those of the fp32 number 1.5 * 2 ** 23 more, which costs nothing.
INT_START = gl.constexpr(0x4B400000)
INT_OFFSET = gl.constexpr(12582912.0)


def why_not(query: Tensor, query_block_size: int, key_block_size: int, precision: str = "native") -> str | None:
    """Why this backend cannot take such a query [B, H, S, D] in a precision; None if it can."""
    if query.device.type != "cuda":
        return f"it needs a CUDA GPU, not {query.device.type}"
    if torch.version.hip is not None:
        return "it does not run on ROCm"
    if torch.cuda.get_device_capability(query.device) != (9, 0):
        return "it needs compute capability 9.0 (Hopper)"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {query.dtype}"
    if query.shape[3] not in HEAD_DIMS:
        return f"head dim {query.shape[3]} is none of {', '.join(map(str, HEAD_DIMS))}"
    if query_block_size != QUERY_BLOCK:
        return f"a query block of {query_block_size} tokens is not {QUERY_BLOCK}"
    if key_block_size not in KEY_BLOCKS:
        return f"a key block of {key_block_size} tokens is none of {', '.join(map(str, KEY_BLOCKS))}"
    return block_sparse_triton.why_not(query, query_block_size, key_block_size, precision)


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
    """The output [B, H, S, D] in query's dtype, and the logsumexp [B, H, S] fp32 (empty if not asked for).

    What the kernel does not compute goes to the Triton kernel: scales that are not positive, other precisions unless
    `QUANTIZES`, and of these INT4 and blocks of 64 keys.
    """
    takes = precision == "native" or (QUANTIZES and key_block_size == TILE.value and precision != "int4")
    if scale <= 0 or not takes:
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
        )
    batch, heads = query.shape[:2]
    if key_length is not None:
        # A weight of 0 does not help against what is not a number.
        beyond = torch.arange(key.shape[2], device=key.device) >= key_length[:, None]
        value = value.masked_fill(beyond[:, None, :, None], 0.0)
    operands = quantized(query, key, value, precision, key_block_size, key_length)
    means = None
    if tail is not None:
        pooled_key, pooled_value = (block_means(x, key_block_size, key_length)[0] for x in (key, value))
        if operands.key_mean is not None:
            pooled_key -= operands.key_mean
        has_tail = tail.expand(batch, heads).to(torch.int32, memory_format=torch.contiguous_format)
        means = pooled_key.to(query.dtype), pooled_value.to(query.dtype), has_tail
    out, lse = launch(
        operands,
        key_blocks,
        counts,
        key_block_size=key_block_size,
        key_length=key_length,
        means=means,
        dtype=query.dtype,
        scale=scale,
        return_lse=return_lse,
    )
    if return_lse and operands.key_mean is not None:
        lse += scale * (query.float() @ operands.key_mean.mT)[..., 0]
    return out, lse


def quantized(
    query: Tensor, key: Tensor, value: Tensor, precision: str, key_block_size: int, key_length: Tensor | None
) -> block_sparse_triton._Operands:
    """What `launch` multiplies: as the Triton kernel's, with FP8 values in the order that FP8 weights come in."""
    if precision != "native":
        query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    operands = block_sparse_triton._operands(query, key, value, precision, QUERY_BLOCK, key_block_size, key_length)
    if operands.value_scale is None:
        return operands
    return replace(operands, value=_interleaved(operands.value))


def _interleaved(value: Tensor) -> Tensor:
    """FP8 values [B, H, D, S'] with pairs of tokens in the order 0 4 1 5 2 6 3 7 of every eight.

    A thread holds the same pairs of logits, next to each other: with this no weight has to go to another thread.
    """
    pairs = value.view(torch.int16).unflatten(-1, (-1, 2, 4))
    return pairs.mT.flatten(-3).view(value.dtype)


def launch(
    operands: block_sparse_triton._Operands,
    key_blocks: Tensor,
    counts: Tensor,
    *,
    key_block_size: int,
    key_length: Tensor | None,
    means: tuple[Tensor, Tensor, Tensor] | None,
    dtype: torch.dtype,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Run the kernel. `means` are of keys and values [B, H, K, D] in `dtype`, and of which heads [B, H] int32."""
    query, key, value = operands.query, operands.key, operands.value
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    out = torch.empty(query.shape, dtype=dtype, device=query.device)
    lse = out.new_empty((batch, heads, num_queries) if return_lse else 0, dtype=torch.float32)
    key_blocks, counts = key_blocks.expand(batch, heads, -1, -1), counts.expand(batch, heads, -1)
    sizes = pooled_key = pooled_value = has_tail = None
    if means is not None:
        # Whole tiles of them, and one at least that belongs to no block.
        num_padded = ((num_keys // key_block_size + 1) // TILE.value + 1) * TILE.value
        sizes = tail_sizes(key_blocks, counts, num_keys, key_block_size, key_length, num_padded)
        pooled_key, pooled_value = (_descriptor(x, TILE.value, head_dim) for x in means[:2])
        has_tail = means[2]
    value_tile = (key_block_size, head_dim) if operands.value_scale is None else (head_dim, key_block_size)
    with torch.cuda.device(query.device):
        attention_kernel[(counts.shape[2], batch * heads)](
            _descriptor(query, ROWS.value, head_dim),
            _descriptor(key, key_block_size, head_dim),
            _descriptor(value, *value_tile),
            _descriptor(out, ROWS.value, head_dim),
            pooled_key,
            pooled_value,
            lse if return_lse else None,
            key_blocks,
            counts,
            key_length,
            operands.query_scale,
            operands.key_scale,
            operands.value_scale,
            has_tail,
            sizes,
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
        x, list(x.shape), [*strides, 1], [1, 1, rows, columns], shared_layout(x.element_size(), columns)
    )


def shared_layout(element_size: int, columns: int) -> Any:
    """How tiles of so many columns lie in the shared memory, as both the copies and the matrix products ask for."""
    return gl.NVMMASharedLayout(min(columns * element_size, 128), element_bitwidth=8 * element_size, rank=2)


# A kernel compiled anew for every kind of number these are would gain nothing.
@gluon.jit(
    do_not_specialize=[
        "lists_stride_b",
        "lists_stride_h",
        "lists_stride_q",
        "lists_stride_c",
        "counts_stride_b",
        "counts_stride_h",
        "counts_stride_q",
        "heads",
        "num_queries",
        "num_keys",
    ]
)
def attention_kernel(
    query_desc,
    key_desc,
    value_desc,
    out_desc,
    pooled_key_desc,
    pooled_value_desc,
    lse_ptr,
    key_blocks_ptr,
    counts_ptr,
    key_length_ptr,
    query_scale_ptr,
    key_scale_ptr,
    value_scale_ptr,
    has_tail_ptr,
    tail_sizes_ptr,
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
    logit_scale,
    HEAD_DIM: gl.constexpr,
    KEY_BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One query block of one head. The optional pointers and descriptors are None where there is nothing to point to.

    A barrier `ready` is passed when a tile has come in, `free` when both warpgroups are done with it. Tiles of block
    means follow the listed ones; where those are quantized, in the same memory, once it is free.

    Values in FP8 lie transposed, [B, H, D, S']. The scales of query and key are per block, [B, H, blocks]; that of
    value is [B, H, D].
    """
    row = gl.program_id(0)
    head_of_batch = gl.program_id(1)
    b, h = head_of_batch // heads, head_of_batch % heads
    b64, h64, row64 = b.to(gl.int64), h.to(gl.int64), row.to(gl.int64)
    count = gl.load(counts_ptr + b64 * counts_stride_b + h64 * counts_stride_h + row64 * counts_stride_q)
    list_ptr = key_blocks_ptr + b64 * lists_stride_b + h64 * lists_stride_h + row64 * lists_stride_q
    # Without a key length at most one listed block is not whole. With one, every tile is looked at.
    length = num_keys
    ragged_place = 0
    first_size = KEY_BLOCK
    if key_length_ptr is not None:
        length = gl.minimum(gl.load(key_length_ptr + b), num_keys)
    else:
        ragged_place, first_size = _find_ragged(list_ptr, lists_stride_c, count, num_keys, KEY_BLOCK)
    BLOCKS_PER_TILE: gl.constexpr = TILE // KEY_BLOCK
    num_tiles = (count + BLOCKS_PER_TILE - 1) // BLOCKS_PER_TILE
    num_missing = num_tiles * BLOCKS_PER_TILE - count
    num_tail_tiles = 0
    if has_tail_ptr is not None:
        num_tail_tiles_if_any = (num_keys // KEY_BLOCK + 1) // TILE + 1
        tail_sizes_ptr += (head_of_batch.to(gl.int64) * gl.num_programs(0) + row) * num_tail_tiles_if_any * TILE
        num_tail_tiles = gl.where(gl.load(has_tail_ptr + head_of_batch) != 0, num_tail_tiles_if_any, 0)

    query_tiles = gl.allocate_shared_memory(query_desc.dtype, [2, ROWS, HEAD_DIM], query_desc.layout)
    key_tiles = gl.allocate_shared_memory(key_desc.dtype, [STAGES, TILE, HEAD_DIM], key_desc.layout)
    QUANTIZED: gl.constexpr = key_scale_ptr is not None
    if QUANTIZED:
        out_tiles = gl.allocate_shared_memory(out_desc.dtype, [2, ROWS, HEAD_DIM], out_desc.layout)
        head_and_row = head_of_batch * gl.num_programs(0) + row
        query_scale = gl.load(query_scale_ptr + head_and_row)
        key_scale_ptr += head_of_batch * ((num_keys + KEY_BLOCK - 1) // KEY_BLOCK)
        scales = (query_scale, key_scale_ptr)
    else:
        out_tiles = query_tiles
        scales = (1.0, None)
    if value_scale_ptr is not None:
        value_scale_ptr += head_of_batch * HEAD_DIM
        value_tiles = gl.allocate_shared_memory(value_desc.dtype, [STAGES, HEAD_DIM, TILE], value_desc.layout)
    else:
        value_tiles = gl.allocate_shared_memory(value_desc.dtype, [STAGES, TILE, HEAD_DIM], value_desc.layout)
    query_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mean_ready = gl.allocate_shared_memory(gl.int64, [STAGES // 2, 1], mbarrier.MBarrierLayout())
    mean_free = gl.allocate_shared_memory(gl.int64, [STAGES // 2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES // 2):
        mbarrier.init(mean_ready.index(i), count=1)
        mbarrier.init(mean_free.index(i), count=2)
    mbarrier.init(query_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(i), count=1)
        mbarrier.init(value_ready.index(i), count=1)
        # Both warpgroups arrive.
        mbarrier.init(key_free.index(i), count=2)
        mbarrier.init(value_free.index(i), count=2)

    keys = (key_tiles, key_ready, key_free)
    values = (value_tiles, value_ready, value_free)
    queries = (query_tiles, query_ready, out_tiles)
    means = (None, None, mean_ready, mean_free)
    if QUANTIZED and pooled_key_desc is not None:
        # Two tiles of quantized keys make room for one of means.
        shape: gl.constexpr = [STAGES // 2, TILE, HEAD_DIM]
        mean_keys = key_tiles._reinterpret(pooled_key_desc.dtype, shape, pooled_key_desc.layout)
        mean_values = value_tiles
        if value_scale_ptr is not None:
            mean_values = value_tiles._reinterpret(pooled_key_desc.dtype, shape, pooled_key_desc.layout)
        means = (mean_keys, mean_values, mean_ready, mean_free)
    lists = (list_ptr, lists_stride_c, num_tiles, num_missing, ragged_place)
    tail = (num_tail_tiles, tail_sizes_ptr, value_scale_ptr)
    softmax = (logit_scale, first_size, None if key_length_ptr is None else length)
    place = (b, h, row)
    results = (out_desc, lse_ptr, head_of_batch, num_queries)
    descs = (query_desc, key_desc, value_desc, pooled_key_desc, pooled_value_desc)
    gl.warp_specialize(
        [
            (_compute, (queries, keys, values, means, lists, tail, softmax, scales, place, results, KEY_BLOCK, 0)),
            (_compute, (queries, keys, values, means, lists, tail, softmax, scales, place, results, KEY_BLOCK, 1)),
            (_copy, (queries, keys, values, means, lists, num_tail_tiles, place, descs, KEY_BLOCK)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _find_ragged(list_ptr, stride, count, num_keys, KEY_BLOCK: gl.constexpr):
    """Where a list has the key block that is cut off by the end, and its size: it goes first, all others are whole.

    Without it, the first place and the size of a whole block.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    PLACES: gl.constexpr = 1024
    place = 0
    size = KEY_BLOCK
    num_left = num_keys % KEY_BLOCK
    if num_left != 0:
        found = -1
        for first in range(0, count, PLACES):
            places = first + gl.arange(0, PLACES, layout=layout)
            blocks = gl.load(list_ptr + places * stride, mask=places < count, other=-1)
            found = gl.maximum(found, gl.max(gl.where(blocks == num_keys // KEY_BLOCK, places, -1), 0))
        place = gl.maximum(found, 0)
        size = gl.where(found >= 0, num_left, KEY_BLOCK)
    return place, size


@gluon.jit
def _copy(queries, keys, values, means, lists, num_tail_tiles, place, descs, KEY_BLOCK: gl.constexpr):
    """Copy the query block, then tile after tile of keys and values as they become free. Runs in one warp."""
    query_tiles, query_ready, _ = queries
    num_tiles = lists[2]
    b, h, row = place
    query_desc, key_desc, value_desc, pooled_key_desc, pooled_value_desc = descs
    FP8_VALUES: gl.constexpr = value_desc.dtype == gl.float8e4nv
    mbarrier.expect(query_ready, 2 * query_desc.block_type.nbytes)
    for i in gl.static_range(2):
        first_query = (2 * row + i) * ROWS
        tma.async_copy_global_to_shared(query_desc, [b, h, first_query, 0], query_ready, query_tiles.index(i))
    for tile in range(num_tiles):
        first, second = _blocks_of(tile, lists, KEY_BLOCK)
        _copy_tile(key_desc, b, h, first * KEY_BLOCK, second * KEY_BLOCK, keys, tile, KEY_BLOCK)
        _copy_tile(value_desc, b, h, first * KEY_BLOCK, second * KEY_BLOCK, values, tile, KEY_BLOCK, FP8_VALUES)
    if means[0] is not None:
        _copy_means(pooled_key_desc, pooled_value_desc, b, h, keys, values, means, num_tiles, num_tail_tiles)
    elif pooled_key_desc is not None:
        for i in range(num_tail_tiles):
            _copy_tile(pooled_key_desc, b, h, i * TILE, 0, keys, num_tiles + i, TILE)
            _copy_tile(pooled_value_desc, b, h, i * TILE, 0, values, num_tiles + i, TILE)


@gluon.jit
def _copy_tile(desc, b, h, first, second, ring, tile, KEY_BLOCK: gl.constexpr, TRANSPOSED: gl.constexpr = False):
    """Copy rows [TILE, D] of one head: those from `first` on, then, of small blocks, those from `second` on."""
    tiles, ready, free = ring
    STAGES: gl.constexpr = tiles.shape[0]
    stage, phase = tile % STAGES, (tile // STAGES) & 1
    rows = tiles.index(stage)
    # The phase before the first counts as passed: nothing has to be freed in the first round.
    mbarrier.wait(free.index(stage), phase ^ 1)
    mbarrier.expect(ready.index(stage), TILE // KEY_BLOCK * desc.block_type.nbytes)
    if TRANSPOSED:
        tma.async_copy_global_to_shared(desc, [b, h, 0, first], ready.index(stage), rows)
    else:
        tma.async_copy_global_to_shared(desc, [b, h, first, 0], ready.index(stage), rows.slice(0, KEY_BLOCK))
    if KEY_BLOCK < TILE:
        tma.async_copy_global_to_shared(desc, [b, h, second, 0], ready.index(stage), rows.slice(KEY_BLOCK, KEY_BLOCK))


@gluon.jit
def _copy_means(key_desc, value_desc, b, h, keys, values, means, num_tiles, num_tail_tiles):
    """Copy the means of blocks to where the quantized keys and values were."""
    mean_keys, mean_values, ready, free = means
    STAGES: gl.constexpr = keys[0].shape[0]
    for i in gl.static_range(STAGES):
        num_uses = (num_tiles - i + STAGES - 1) // STAGES
        mbarrier.wait(keys[2].index(i), (num_uses - 1) & 1)
        mbarrier.wait(values[2].index(i), (num_uses - 1) & 1)
    for tile in range(num_tail_tiles):
        stage, phase = tile % (STAGES // 2), (tile // (STAGES // 2)) & 1
        mbarrier.wait(free.index(stage), phase ^ 1)
        mbarrier.expect(ready.index(stage), 2 * key_desc.block_type.nbytes)
        first = [b, h, tile * TILE, 0]
        tma.async_copy_global_to_shared(key_desc, first, ready.index(stage), mean_keys.index(stage))
        tma.async_copy_global_to_shared(value_desc, first, ready.index(stage), mean_values.index(stage))


@gluon.jit
def _blocks_of(tile, lists, KEY_BLOCK: gl.constexpr):
    """The key block of a listed tile, twice, or the two of them."""
    list_ptr, stride, _, num_missing, ragged_place = lists
    BLOCKS_PER_TILE: gl.constexpr = TILE // KEY_BLOCK
    first = gl.load(list_ptr + _place(tile * BLOCKS_PER_TILE, num_missing, ragged_place) * stride)
    second = first
    if BLOCKS_PER_TILE == 2:
        second = gl.load(list_ptr + _place(tile * 2 + 1, num_missing, ragged_place) * stride)
    return first, second


@gluon.jit
def _place(slot, num_missing, ragged_place):
    """The place in the list of what is copied as number `slot`: the first and the ragged block change places.

    Where a tile is not full it is the first one. What is missing is filled up with a block that is there.
    """
    place = gl.maximum(slot - num_missing, 0)
    return gl.where(place == 0, ragged_place, gl.where(place == ragged_place, 0, place))


@gluon.jit
def _compute(
    queries,
    keys,
    values,
    means,
    lists,
    tail,
    softmax,
    scales,
    place,
    results,
    KEY_BLOCK: gl.constexpr,
    PART: gl.constexpr,
):
    """Attention of one half of the query block. Runs in one warpgroup.

    The product of a tile's weights and values runs together with the next tile's softmax.
    """
    query_tiles, query_ready, out_tiles = queries
    key_tiles, key_ready, key_free = keys
    value_tiles, value_ready, value_free = values
    num_tiles, num_missing = lists[2], lists[3]
    num_tail_tiles, tail_sizes_ptr, value_scale_ptr = tail
    logit_scale, first_size, key_length = softmax
    query_scale, key_scale_ptr = scales
    b, h, row = place
    out_desc, lse_ptr, head_of_batch, num_queries = results
    STAGES: gl.constexpr = key_tiles.shape[0]
    HEAD_DIM: gl.constexpr = key_tiles.shape[2]
    QUANTIZED: gl.constexpr = key_scale_ptr is not None
    FP8_VALUES: gl.constexpr = value_tiles.dtype == gl.float8e4nv
    BOOST: gl.constexpr = FP8_BOOST if FP8_VALUES else 0.0
    OFFSET: gl.constexpr = INT_OFFSET if key_tiles.dtype == gl.int8 else 0.0
    logits_layout: gl.constexpr = _product_layout(TILE, key_tiles.dtype)
    out_layout: gl.constexpr = _product_layout(HEAD_DIM, value_tiles.dtype)
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)

    query = query_tiles.index(PART)  # [ROWS, HEAD_DIM]
    numerator = gl.zeros([ROWS, HEAD_DIM], gl.float32, out_layout)
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, logits_layout))
    peak = gl.full([ROWS], NO_PEAK, gl.float32, gl.SliceLayout(1, logits_layout))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, logits_layout))

    second_size = KEY_BLOCK
    if key_length is not None:
        first_size, second_size = _sizes_of(0, lists, key_length, KEY_BLOCK)
    scale = logit_scale
    if QUANTIZED:
        # The scale of a tile is read a tile ahead, and where it is to be read two tiles ahead.
        scale *= query_scale * gl.load(key_scale_ptr + _block_of(0, lists))
        next_scale = gl.load(key_scale_ptr + _block_of(1, lists))
        next_block = _block_of(2, lists)
    mbarrier.wait(query_ready, 0)
    mbarrier.wait(key_ready.index(0), 0)
    # [ROWS, TILE]
    logits = warpgroup_mma_wait(0, deps=[_start_logits(query, key_tiles.index(0))])
    mbarrier.arrive(key_free.index(0), count=1)
    exists = _exists(columns, first_size, gl.where(num_missing == 0, second_size, 0), KEY_BLOCK)
    logits = gl.where(exists[None, :], _as_float(logits), -float("inf"))
    peak, fade, weights, total = _online_softmax(logits, scale, peak, total, OFFSET, BOOST)
    weights = _as_operand(weights, value_tiles.dtype, out_layout)
    mbarrier.wait(value_ready.index(0), 0)

    for tile in range(1, num_tiles):
        sizes = None
        if key_length is not None:
            sizes = _sizes_of(tile, lists, key_length, KEY_BLOCK)
        if QUANTIZED:
            scale = logit_scale * query_scale * next_scale
            next_scale = gl.load(key_scale_ptr + next_block)
            next_block = _block_of(tile + 2, lists)
        weights, numerator, fade, peak, total = _take_tile(
            tile, query, keys, values, weights, numerator, fade, peak, total, scale, columns, sizes, None, KEY_BLOCK
        )
    last_tile = num_tiles - 1
    if tail_sizes_ptr is not None and not QUANTIZED:
        for i in range(num_tail_tiles):
            means_ptr = tail_sizes_ptr + i * TILE
            weights, numerator, fade, peak, total = _take_tile(
                num_tiles + i,
                query,
                keys,
                values,
                weights,
                numerator,
                fade,
                peak,
                total,
                scale,
                columns,
                None,
                means_ptr,
                KEY_BLOCK,
            )
        last_tile += num_tail_tiles

    product = warpgroup_mma_wait(0, deps=[_start_product(weights, value_tiles.index(last_tile % STAGES), numerator)])
    numerator = numerator * gl.convert_layout(fade, out_rows)[:, None] + product if FP8_VALUES else product
    if value_scale_ptr is not None:
        value_scale = gl.load(value_scale_ptr + gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, out_layout)))
        numerator = numerator * value_scale[None, :]
    if tail_sizes_ptr is not None and QUANTIZED:
        # Means are not quantized, and meet the query that the listed keys have met.
        if num_tail_tiles > 0:
            out_tiles.index(PART).store(_scaled(query, query_scale, out_desc.dtype))
            fence_async_shared()
        # Arriving waits for the other warps, whose rows of the query the products take too.
        mbarrier.arrive(value_free.index(last_tile % STAGES), count=1)
        mean_layout: gl.constexpr = _product_layout(HEAD_DIM, out_desc.dtype)
        mean_rows: gl.constexpr = gl.SliceLayout(1, _product_layout(TILE, out_desc.dtype))
        numerator = gl.convert_layout(numerator, mean_layout)
        peak, total = gl.convert_layout(peak, mean_rows), gl.convert_layout(total, mean_rows)
        for i in range(num_tail_tiles):
            numerator, peak, total = _take_means(
                i, out_tiles.index(PART), means, numerator, peak, total, logit_scale, tail_sizes_ptr + i * TILE, BOOST
            )
        numerator = gl.convert_layout(numerator, out_layout)
        peak, total = (
            gl.convert_layout(peak, gl.SliceLayout(1, logits_layout)),
            gl.convert_layout(total, gl.SliceLayout(1, logits_layout)),
        )
    # Where nothing is seen the numerator is 0, and stays it.
    share = gl.where(total > 0, 1.0 / total, 1.0)
    out = numerator * gl.convert_layout(share, out_rows)[:, None]
    # The queries have been used for the last time, and make room. Rows beyond the last query are not written.
    first_query = (2 * row + PART) * ROWS
    out_tiles.index(PART).store(out.to(out_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [b, h, first_query, 0], out_tiles.index(PART))
    if lse_ptr is not None:
        rows = first_query + gl.arange(0, ROWS, layout=gl.SliceLayout(1, logits_layout))
        lse = (peak + gl.log2(total) - BOOST) * LN_2
        gl.store(lse_ptr + head_of_batch.to(gl.int64) * num_queries + rows, lse, mask=rows < num_queries)
    tma.store_wait(0)


@gluon.jit
def _take_tile(
    tile,
    query,
    keys,
    values,
    weights,
    numerator,
    fade,
    peak,
    total,
    scale,
    columns,
    sizes,
    means_ptr,
    KEY_BLOCK: gl.constexpr,
):
    """Take the last tile's weights [ROWS, TILE] into the numerator, this tile's into the total.

    `sizes` is how many keys of each of the tile's blocks exist, None if all do. At `means_ptr` is how many tokens
    each key is the mean of, None if none is one.

    The tensor cores of Hopper keep sums of FP8 products to 14 bits: those of a tile are added in fp32, with the
    numerator one `fade` behind, so that both take one instruction.
    """
    key_tiles, key_ready, key_free = keys
    value_tiles, value_ready, value_free = values
    STAGES: gl.constexpr = key_tiles.shape[0]
    FP8_VALUES: gl.constexpr = value_tiles.dtype == gl.float8e4nv
    BOOST: gl.constexpr = FP8_BOOST if FP8_VALUES else 0.0
    OFFSET: gl.constexpr = INT_OFFSET if key_tiles.dtype == gl.int8 else 0.0
    out_layout: gl.constexpr = numerator.type.layout
    stage, phase, last_stage = tile % STAGES, (tile // STAGES) & 1, (tile - 1) % STAGES
    mbarrier.wait(key_ready.index(stage), phase)
    logits = _start_logits(query, key_tiles.index(stage))
    product = _start_product(weights, value_tiles.index(last_stage), numerator)
    if means_ptr is not None:
        num_tokens = gl.load(means_ptr + columns)
    logits = warpgroup_mma_wait(1, deps=[logits])
    mbarrier.arrive(key_free.index(stage), count=1)
    logits = _as_float(logits)
    if sizes is not None:  # noqa: SIM102 (the compiler would look at both halves)
        if gl.minimum(sizes[0], sizes[1]) < KEY_BLOCK:
            logits = gl.where(_exists(columns, sizes[0], sizes[1], KEY_BLOCK)[None, :], logits, -float("inf"))
    if means_ptr is not None:
        logits = logits * scale + gl.log2(num_tokens.to(gl.float32))[None, :]
        scale = 1.0
    peak, new_fade, new_weights, total = _online_softmax(logits, scale, peak, total, OFFSET, BOOST)
    # Waiting for the values here and not in the next round keeps ptxas from moving the softmax behind what follows.
    mbarrier.wait(value_ready.index(stage), phase)
    product = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(value_free.index(last_stage), count=1)
    weights = _as_operand(new_weights, value_tiles.dtype, out_layout)
    if FP8_VALUES:
        numerator = numerator * gl.convert_layout(fade, gl.SliceLayout(1, out_layout))[:, None] + product
    else:
        numerator = product * gl.convert_layout(new_fade, gl.SliceLayout(1, out_layout))[:, None]
    return weights, numerator, new_fade, peak, total


@gluon.jit
def _take_means(tile, query, means, numerator, peak, total, scale, means_ptr, BOOST: gl.constexpr):
    """Take a tile of block means into the sums. At `means_ptr` is how many tokens each is the mean of."""
    mean_keys, mean_values, ready, free = means
    STAGES: gl.constexpr = mean_keys.shape[0]
    stage, phase = tile % STAGES, (tile // STAGES) & 1
    mbarrier.wait(ready.index(stage), phase)
    layout: gl.constexpr = numerator.type.layout
    logits_layout: gl.constexpr = _product_layout(TILE, mean_keys.dtype)
    logits = _start_logits(query, mean_keys.index(stage))
    num_tokens = gl.load(means_ptr + gl.arange(0, TILE, layout=gl.SliceLayout(0, logits_layout)))
    logits = warpgroup_mma_wait(0, deps=[logits])
    logits = logits * scale + gl.log2(num_tokens.to(gl.float32))[None, :]
    peak, fade, weights, total = _online_softmax(logits, 1.0, peak, total, 0.0, BOOST)
    weights = _as_operand(weights, mean_values.dtype, layout)
    numerator = numerator * gl.convert_layout(fade, gl.SliceLayout(1, layout))[:, None]
    numerator = warpgroup_mma(weights, mean_values.index(stage), numerator, is_async=True)
    numerator = warpgroup_mma_wait(0, deps=[numerator])
    mbarrier.arrive(free.index(stage), count=1)
    return numerator, peak, total


@gluon.constexpr_function
def _product_layout(columns, dtype):
    """How a warpgroup holds the product of [ROWS, n] and [n, columns] of a dtype."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 256 // dtype.primitive_bitwidth])


@gluon.jit
def _start_logits(query, key_tile):
    """Products [ROWS, TILE] of queries and keys, not waited for; those of INT8 start at INT_START."""
    layout: gl.constexpr = _product_layout(TILE, key_tile.dtype)
    if key_tile.dtype == gl.int8:
        start = gl.full([ROWS, TILE], INT_START, gl.int32, layout)
        logits = warpgroup_mma(query, key_tile.permute((1, 0)), start, is_async=True)
    else:
        start = gl.zeros([ROWS, TILE], gl.float32, layout)
        logits = warpgroup_mma(query, key_tile.permute((1, 0)), start, use_acc=False, is_async=True)
    return logits


@gluon.jit
def _as_float(logits):
    if logits.dtype == gl.int32:
        logits = logits.to(gl.float32, bitcast=True)
    return logits


@gluon.jit
def _online_softmax(logits, scale, peak, total, OFFSET: gl.constexpr, BOOST: gl.constexpr):
    """The new peak, in base 2, what older sums shrink by, the weights times 2 ** BOOST, and their new total.

    `logits` are OFFSET too large.
    """
    largest = gl.max(logits, 1)
    if OFFSET != 0.0:
        largest = largest - OFFSET
    new_peak = gl.maximum(peak, largest * scale)
    fade = gl.exp2(peak - new_peak)
    shift = new_peak
    if OFFSET != 0.0:
        shift = shift + OFFSET * scale
    if BOOST != 0.0:
        shift = shift - BOOST
    weights = gl.exp2(logits * scale - shift[:, None])
    return new_peak, fade, weights, total * fade + gl.sum(weights, 1)


@gluon.jit
def _as_operand(weights, dtype: gl.constexpr, out_layout: gl.constexpr):
    """Weights [ROWS, TILE] as the next product takes them; of FP8 four in an int32, in the order of `_interleaved`.

    Bytes that go from one round of a loop to the next would each take a register.
    """
    if dtype == gl.float8e4nv:
        weights = weights.reshape([ROWS, TILE // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4))
        even, odd = gl.split(weights)
        first, third = gl.split(even)
        second, fourth = gl.split(odd)
        weights = gl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,f,f,f,f",
            [first, second, third, fourth],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        weights = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, out_layout, 2))
    return weights


@gluon.jit
def _four_bytes(packed, out_layout: gl.constexpr):
    """FP8 weights [ROWS, TILE] of `packed` [ROWS, TILE / 16, 4]."""
    first, second = packed.to(gl.int8), (packed >> 8).to(gl.int8)
    third, fourth = (packed >> 16).to(gl.int8), (packed >> 24).to(gl.int8)
    weights = gl.join(gl.join(first, third), gl.join(second, fourth)).reshape([ROWS, TILE])
    return gl.convert_layout(weights.to(gl.float8e4nv, bitcast=True), gl.DotOperandLayout(0, out_layout, 4))


@gluon.jit
def _start_product(weights, value_tile, numerator):
    """Products [ROWS, D] of weights and values, not waited for: added to the numerator, but for those of FP8."""
    if value_tile.dtype == gl.float8e4nv:
        layout: gl.constexpr = numerator.type.layout
        nothing = gl.zeros([ROWS, numerator.shape[1]], gl.float32, layout)
        weights = _four_bytes(weights, layout)
        product = warpgroup_mma(weights, value_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
    else:
        product = warpgroup_mma(weights, value_tile, numerator, is_async=True)
    return product


@gluon.jit
def _scaled(query, scale, dtype: gl.constexpr):
    """Quantized queries [ROWS, D] times their scale."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    return (query.load(layout).to(gl.float32) * scale).to(dtype)


@gluon.jit
def _block_of(tile, lists):
    """The key block of a listed tile of one block; of the last one from its number on."""
    list_ptr, stride, num_tiles, num_missing, ragged_place = lists
    return gl.load(list_ptr + _place(gl.minimum(tile, num_tiles - 1), num_missing, ragged_place) * stride)


@gluon.jit
def _sizes_of(tile, lists, length, KEY_BLOCK: gl.constexpr):
    """How many keys of the blocks of a listed tile exist: a whole block or more, or fewer, or none."""
    first, second = _blocks_of(tile, lists, KEY_BLOCK)
    return length - first * KEY_BLOCK, length - second * KEY_BLOCK


@gluon.jit
def _exists(columns, first_size, second_size, KEY_BLOCK: gl.constexpr):
    """Which keys of a tile exist, [TILE]."""
    in_first = columns < KEY_BLOCK
    return gl.where(in_first, columns < first_size, columns - KEY_BLOCK < second_size)

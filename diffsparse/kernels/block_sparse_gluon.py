"""Block-sparse attention for Hopper, in Gluon: one warp copies tiles of keys and values, two warpgroups compute.

What `block_sparse_triton.py` computes, for the shapes that matter most and where its tensor cores would wait. The
division of labour and the overlap of softmax and matrix products are FlashAttention-3's (arXiv:2407.08608).
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

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

LOG2_E = 1.4426950408889634
LN_2 = gl.constexpr(0.6931471805599453)
QUERY_BLOCK = 128
KEY_BLOCKS = (64, 128)
# Tiles of keys and of values in shared memory at a time, by head dim. What is left over is too small for another.
STAGES = {64: 6, 128: 3}
# Whether the warpgroups take turns, so that one multiplies while the other has its softmax.
TAKE_TURNS = True
# A warpgroup multiplies 64 rows at a time: two of them share a query block.
ROWS = gl.constexpr(64)
# Keys taken at a time: one key block or two.
TILE = gl.constexpr(128)
# How the shared memory is laid out that both the copies and the matrix products ask for.
SHARED_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


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
    if query.shape[3] not in STAGES:
        return f"head dim {query.shape[3]} is none of {', '.join(map(str, STAGES))}"
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

    Key lengths, pooled tails, other precisions and scales that are not positive go to the Triton kernel.
    """
    if key_length is not None or tail is not None or scale <= 0 or precision != "native":
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
    batch, heads, num_queries, head_dim = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, heads, num_queries) if return_lse else 0, dtype=torch.float32)
    key_blocks, counts = key_blocks.expand(batch, heads, -1, -1), counts.expand(batch, heads, -1)
    with torch.cuda.device(query.device):
        attention_kernel[(counts.shape[2], batch * heads)](
            _descriptor(query, ROWS.value),
            _descriptor(key, key_block_size),
            _descriptor(value, key_block_size),
            _descriptor(out, ROWS.value),
            lse if return_lse else None,
            key_blocks,
            counts,
            *key_blocks.stride(),
            *counts.stride(),
            heads,
            num_queries,
            key.shape[2],
            scale * LOG2_E,
            HEAD_DIM=head_dim,
            KEY_BLOCK=key_block_size,
            STAGES=STAGES[head_dim],
            TAKE_TURNS=TAKE_TURNS,
            num_warps=4,
        )
    return out, lse


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """What the copy engine needs to take `rows` rows of x [B, H, S, D] at a time: zeros beyond the last row."""
    # Strides of sizes of 1 mean nothing, and may be any number.
    strides = [stride if size > 1 else x.shape[3] for size, stride in zip(x.shape[:3], x.stride())]
    if x.stride(3) != 1 or x.data_ptr() % 16 or any(stride == 0 or stride % 8 for stride in strides):
        x = x.clone(memory_format=torch.contiguous_format)
        strides = list(x.stride()[:3])
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, x.shape[3]], SHARED_LAYOUT.value)


@gluon.jit
def attention_kernel(
    query_desc,
    key_desc,
    value_desc,
    out_desc,
    lse_ptr,
    key_blocks_ptr,
    counts_ptr,
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
    TAKE_TURNS: gl.constexpr,
):
    """One query block of one head. `lse_ptr` may be None.

    A barrier `ready` is passed when a tile has come in, `free` when both warpgroups are done with it.
    """
    row = gl.program_id(0)
    head_of_batch = gl.program_id(1)
    b, h = head_of_batch // heads, head_of_batch % heads
    b64, h64, row64 = b.to(gl.int64), h.to(gl.int64), row.to(gl.int64)
    count = gl.load(counts_ptr + b64 * counts_stride_b + h64 * counts_stride_h + row64 * counts_stride_q)
    list_ptr = key_blocks_ptr + b64 * lists_stride_b + h64 * lists_stride_h + row64 * lists_stride_q
    ragged_place, first_size = _find_ragged(list_ptr, lists_stride_c, count, num_keys, KEY_BLOCK)
    BLOCKS_PER_TILE: gl.constexpr = TILE // KEY_BLOCK
    num_tiles = (count + BLOCKS_PER_TILE - 1) // BLOCKS_PER_TILE
    num_missing = num_tiles * BLOCKS_PER_TILE - count

    dtype: gl.constexpr = query_desc.dtype
    query_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], SHARED_LAYOUT)
    key_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], SHARED_LAYOUT)
    value_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], SHARED_LAYOUT)
    query_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(query_ready, count=1)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(i), count=1)
        mbarrier.init(value_ready.index(i), count=1)
        # Both warpgroups arrive.
        mbarrier.init(key_free.index(i), count=2)
        mbarrier.init(value_free.index(i), count=2)

    keys = (key_tiles, key_ready, key_free)
    values = (value_tiles, value_ready, value_free)
    queries = (query_tiles, query_ready)
    softmax = (num_tiles, num_missing, first_size, logit_scale)
    place = (b, h, row)
    results = (out_desc, lse_ptr, head_of_batch, num_queries)
    lists = (list_ptr, lists_stride_c, num_tiles, num_missing, ragged_place)
    gl.warp_specialize(
        [
            (_compute, (queries, keys, values, turns, softmax, place, results, KEY_BLOCK, TAKE_TURNS, 0)),
            (_compute, (queries, keys, values, turns, softmax, place, results, KEY_BLOCK, TAKE_TURNS, 1)),
            (_copy, (queries, keys, values, lists, place, query_desc, key_desc, value_desc, KEY_BLOCK)),
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
def _copy(queries, keys, values, lists, place, query_desc, key_desc, value_desc, KEY_BLOCK: gl.constexpr):
    """Copy the query block, then tile after tile of keys and values as they become free. Runs in one warp."""
    query_tiles, query_ready = queries
    list_ptr, stride, num_tiles, num_missing, ragged_place = lists
    b, h, row = place
    BLOCKS_PER_TILE: gl.constexpr = TILE // KEY_BLOCK
    STAGES: gl.constexpr = keys[0].shape[0]
    mbarrier.expect(query_ready, 2 * query_desc.block_type.nbytes)
    for i in gl.static_range(2):
        first_query = (2 * row + i) * ROWS
        tma.async_copy_global_to_shared(query_desc, [b, h, first_query, 0], query_ready, query_tiles.index(i))
    for tile in range(num_tiles):
        first = gl.load(list_ptr + _place(tile * BLOCKS_PER_TILE, num_missing, ragged_place) * stride) * KEY_BLOCK
        second = first
        if BLOCKS_PER_TILE == 2:
            second = gl.load(list_ptr + _place(tile * 2 + 1, num_missing, ragged_place) * stride) * KEY_BLOCK
        _copy_tile(key_desc, b, h, first, second, keys, tile % STAGES, (tile // STAGES) & 1, KEY_BLOCK)
        _copy_tile(value_desc, b, h, first, second, values, tile % STAGES, (tile // STAGES) & 1, KEY_BLOCK)


@gluon.jit
def _copy_tile(desc, b, h, first, second, ring, stage, phase, KEY_BLOCK: gl.constexpr):
    """Copy rows [TILE, D] of one head: those from `first` on, then, of small blocks, those from `second` on."""
    tiles, ready, free = ring
    tile = tiles.index(stage)
    # The phase before the first counts as passed: nothing has to be freed in the first round.
    mbarrier.wait(free.index(stage), phase ^ 1)
    mbarrier.expect(ready.index(stage), TILE // KEY_BLOCK * desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [b, h, first, 0], ready.index(stage), tile.slice(0, KEY_BLOCK))
    if KEY_BLOCK < TILE:
        tma.async_copy_global_to_shared(desc, [b, h, second, 0], ready.index(stage), tile.slice(KEY_BLOCK, KEY_BLOCK))


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
    turns,
    softmax,
    place,
    results,
    KEY_BLOCK: gl.constexpr,
    TAKE_TURNS: gl.constexpr,
    PART: gl.constexpr,
):
    """Attention of one half of the query block. Runs in one warpgroup.

    The product of a tile's weights and values runs together with the next tile's softmax.
    """
    query_tiles, query_ready = queries
    key_tiles, key_ready, key_free = keys
    value_tiles, value_ready, value_free = values
    num_tiles, num_missing, first_size, logit_scale = softmax
    b, h, row = place
    out_desc, lse_ptr, head_of_batch, num_queries = results
    STAGES: gl.constexpr = key_tiles.shape[0]
    HEAD_DIM: gl.constexpr = key_tiles.shape[2]
    dtype: gl.constexpr = key_tiles.dtype
    logits_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)

    query = query_tiles.index(PART)  # [ROWS, HEAD_DIM]
    no_logits = gl.zeros([ROWS, TILE], gl.float32, logits_layout)
    numerator = gl.zeros([ROWS, HEAD_DIM], gl.float32, out_layout)

    mbarrier.wait(query_ready, 0)
    mbarrier.wait(key_ready.index(0), 0)
    # [ROWS, TILE]
    logits = warpgroup_mma(query, key_tiles.index(0).permute((1, 0)), no_logits, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(0, deps=[logits])
    mbarrier.arrive(key_free.index(0), count=1)
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, logits_layout))
    exists = columns < first_size
    if KEY_BLOCK < TILE:
        exists = exists | ((columns >= KEY_BLOCK) & (columns < TILE - num_missing * KEY_BLOCK))
    logits = gl.where(exists[None, :], logits, -float("inf"))
    peak = gl.max(logits, 1) * logit_scale
    weights = gl.exp2(logits * logit_scale - peak[:, None])
    total = gl.sum(weights, 1)
    weights = gl.convert_layout(weights.to(dtype), weights_layout)
    mbarrier.wait(value_ready.index(0), 0)

    for tile in range(1, num_tiles):
        stage, phase = tile % STAGES, (tile // STAGES) & 1
        last_stage = (tile - 1) % STAGES
        mbarrier.wait(key_ready.index(stage), phase)
        if TAKE_TURNS:
            # The other warpgroup has arrived once for every tile but, for the first warpgroup, this one.
            mbarrier.wait(turns.index(PART), ((tile - 1) & 1) ^ (1 - PART))
        logits = warpgroup_mma(query, key_tiles.index(stage).permute((1, 0)), no_logits, use_acc=False, is_async=True)
        numerator = warpgroup_mma(weights, value_tiles.index(last_stage), numerator, is_async=True)
        if TAKE_TURNS:
            mbarrier.arrive(turns.index(1 - PART), count=1)
        logits = warpgroup_mma_wait(1, deps=[logits])
        mbarrier.arrive(key_free.index(stage), count=1)
        new_peak = gl.maximum(peak, gl.max(logits, 1) * logit_scale)
        fade = gl.exp2(peak - new_peak)
        peak = new_peak
        new_weights = gl.exp2(logits * logit_scale - peak[:, None])
        total = total * fade + gl.sum(new_weights, 1)
        # Waiting for the values here and not in the next round keeps ptxas from moving the softmax behind what follows.
        mbarrier.wait(value_ready.index(stage), phase)
        numerator = warpgroup_mma_wait(0, deps=[numerator])
        mbarrier.arrive(value_free.index(last_stage), count=1)
        weights = gl.convert_layout(new_weights.to(dtype), weights_layout)
        numerator = numerator * gl.convert_layout(fade, out_rows)[:, None]

    numerator = warpgroup_mma(weights, value_tiles.index((num_tiles - 1) % STAGES), numerator, is_async=True)
    numerator = warpgroup_mma_wait(0, deps=[numerator])
    out = numerator * gl.convert_layout(1.0 / total, out_rows)[:, None]
    # The queries have been used for the last time, and make room. Rows beyond the last query are not written.
    first_query = (2 * row + PART) * ROWS
    query.store(out.to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [b, h, first_query, 0], query)
    if lse_ptr is not None:
        rows = first_query + gl.arange(0, ROWS, layout=gl.SliceLayout(1, logits_layout))
        lse = (peak + gl.log2(total)) * LN_2
        gl.store(lse_ptr + head_of_batch.to(gl.int64) * num_queries + rows, lse, mask=rows < num_queries)
    tma.store_wait(0)

"""The Hopper kernel: its shared memory, its barriers, and which warps do what."""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from diffsparse.kernels.hopper_attention_gluon import attend_half
from diffsparse.kernels.hopper_copies_gluon import copy_tiles
from diffsparse.kernels.hopper_lists_gluon import TILE, find_ragged
from diffsparse.kernels.hopper_products_gluon import ROWS
from diffsparse.kernels.hopper_tiles_gluon import tiles_in, tiles_of


# A kernel compiled anew for every kind of number these are would gain nothing.
@gluon.jit(
    do_not_specialize=[
        "query_order_stride_h",
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
    query_ptr,
    key_desc,
    value_desc,
    out_ptr,
    pooled_key_desc,
    pooled_value_desc,
    lse_ptr,
    key_blocks_ptr,
    counts_ptr,
    schedule_ptr,
    query_order_ptr,
    key_length_ptr,
    query_scale_ptr,
    key_scale_ptr,
    value_scale_ptr,
    has_tail_ptr,
    tail_logs_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    out_stride_b,
    out_stride_h,
    out_stride_s,
    query_order_stride_h,
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
    """One query block of one head, which one says the schedule.

    Optional pointers and descriptors are None where there is nothing to point to. `query_order_ptr` says where the
    queries come from, unless they are quantized and in order already, and where the rows of the output go.

    A barrier `ready` is passed when a tile has come in, `free` when both warpgroups are done with it. Tiles of block
    means follow the listed ones; where those are quantized, in the same memory, once it is free.

    Values in FP8 lie transposed, [B, H, D, S']. The scales of query and key are per block, [B, H, blocks]; that of
    value is [B, H, D].
    """
    num_rows = (num_queries + 2 * ROWS - 1) // (2 * ROWS)
    row_of_all = gl.load(schedule_ptr + gl.program_id(0))
    row, head_of_batch = row_of_all % num_rows, row_of_all // num_rows
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
        ragged_place, first_size = find_ragged(list_ptr, lists_stride_c, count, num_keys, KEY_BLOCK)
    BLOCKS_PER_TILE: gl.constexpr = TILE // KEY_BLOCK
    num_tiles = (count + BLOCKS_PER_TILE - 1) // BLOCKS_PER_TILE
    num_missing = num_tiles * BLOCKS_PER_TILE - count
    num_tail_tiles = 0
    if has_tail_ptr is not None:
        num_tail_tiles_if_any = (num_keys // KEY_BLOCK + 1) // TILE + 1
        tail_logs_ptr += row_of_all.to(gl.int64) * num_tail_tiles_if_any * TILE
        num_tail_tiles = gl.where(gl.load(has_tail_ptr + head_of_batch) != 0, num_tail_tiles_if_any, 0)

    query_tiles = tiles_of(query_ptr.dtype.element_ty, 2, ROWS, HEAD_DIM)
    key_tiles = tiles_of(key_desc.dtype, STAGES, TILE, HEAD_DIM)
    QUANTIZED: gl.constexpr = key_scale_ptr is not None
    if QUANTIZED:
        out_tiles = tiles_of(out_ptr.dtype.element_ty, 2, ROWS, HEAD_DIM)
        query_scale = gl.load(query_scale_ptr + row_of_all)
        key_scale_ptr += head_of_batch * ((num_keys + KEY_BLOCK - 1) // KEY_BLOCK)
        key_scales = gl.allocate_shared_memory(
            gl.float32, [STAGES * BLOCKS_PER_TILE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
        )
        scales = (query_scale, key_scales)
        copied_scales = (key_scales, key_scale_ptr)
    else:
        out_tiles = query_tiles
        scales = (None, None)
        copied_scales = (None, None)
    if value_scale_ptr is not None:
        value_scale_ptr += head_of_batch * HEAD_DIM
        value_tiles = tiles_of(value_desc.dtype, STAGES * BLOCKS_PER_TILE, HEAD_DIM, KEY_BLOCK)
    else:
        value_tiles = tiles_of(value_desc.dtype, STAGES, TILE, HEAD_DIM)
    key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(i), count=1)
        mbarrier.init(value_ready.index(i), count=1)
        # Both warpgroups arrive.
        mbarrier.init(key_free.index(i), count=2)
        mbarrier.init(value_free.index(i), count=2)

    keys = (key_tiles, key_ready, key_free)
    values = (value_tiles, value_ready, value_free)
    query_ptr += b64 * query_stride_b + h64 * query_stride_h
    if query_order_ptr is not None:
        query_order_ptr += h64 * query_order_stride_h
    queries = (query_ptr, query_stride_s, None if QUANTIZED else query_order_ptr, query_tiles)
    means = (None, None, None, None)
    if QUANTIZED and pooled_key_desc is not None:
        # Two tiles of quantized keys make room for one of means.
        mean_keys = tiles_in(key_tiles, pooled_key_desc.dtype, STAGES // 2, TILE, HEAD_DIM)
        mean_values = value_tiles
        if value_scale_ptr is not None:
            mean_values = tiles_in(value_tiles, pooled_key_desc.dtype, STAGES // 2, TILE, HEAD_DIM)
        mean_ready = gl.allocate_shared_memory(gl.int64, [STAGES // 2, 1], mbarrier.MBarrierLayout())
        mean_free = gl.allocate_shared_memory(gl.int64, [STAGES // 2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES // 2):
            mbarrier.init(mean_ready.index(i), count=1)
            mbarrier.init(mean_free.index(i), count=2)
        means = (mean_keys, mean_values, mean_ready, mean_free)
    lists = (list_ptr, lists_stride_c, num_tiles, num_missing, ragged_place)
    tail = (num_tail_tiles, tail_logs_ptr, value_scale_ptr)
    softmax = (logit_scale, first_size, None if key_length_ptr is None else length)
    out_ptr += b64 * out_stride_b + h64 * out_stride_h
    if lse_ptr is not None:
        lse_ptr += head_of_batch.to(gl.int64) * num_queries
    results = (out_ptr, out_stride_s, query_order_ptr, lse_ptr, out_tiles)
    rows = (row, num_queries)
    descs = (key_desc, value_desc, pooled_key_desc, pooled_value_desc)
    gl.warp_specialize(
        [
            (attend_half, (queries, keys, values, means, lists, tail, softmax, scales, rows, results, KEY_BLOCK, 0)),
            (attend_half, (queries, keys, values, means, lists, tail, softmax, scales, rows, results, KEY_BLOCK, 1)),
            (copy_tiles, (keys, values, means, lists, copied_scales, num_tail_tiles, (b, h), descs, KEY_BLOCK)),
        ],
        [4, 1],
        [240, 24],
    )

"""Block-sparse attention for Hopper, in Gluon: one warp copies tiles of keys and values, two warpgroups compute.

What `block_sparse_triton.py` computes, for the shapes that matter most and where its tensor cores would wait. The
division of labour and the overlap of softmax and matrix products are FlashAttention-3's (arXiv:2407.08608).
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
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
from diffsparse.kernels.pooling import block_means, block_token_counts

LOG2_E = 1.4426950408889634
LN_2 = gl.constexpr(0.6931471805599453)
QUERY_BLOCK = 128
KEY_BLOCKS = (64, 128)
# Tiles of keys and of values in shared memory at a time, by head dim. What is left over is too small for another.
STAGES = {64: 6, 128: 3}
# A warpgroup multiplies 64 rows at a time: two of them share a query block.
ROWS = gl.constexpr(64)
# The least a row's largest logit is taken for, in base 2: -inf - -inf, where nothing is seen, is not a number.
NO_PEAK = gl.constexpr(-1e30)
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

    Precisions other than "native" and scales that are not positive go to the Triton kernel, which has them.
    """
    if precision != "native" or scale <= 0:
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
    num_keys = key.shape[2]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, heads, num_queries) if return_lse else 0, dtype=torch.float32)
    key_blocks, counts = key_blocks.expand(batch, heads, -1, -1), counts.expand(batch, heads, -1)
    if key_length is not None:
        # A weight of 0 does not help against what is not a number.
        beyond = torch.arange(num_keys, device=key.device) >= key_length[:, None]
        value = value.masked_fill(beyond[:, None, :, None], 0.0)
    tail_sizes = pooled_key = pooled_value = has_tail = None
    if tail is not None:
        tail_sizes = _tail_sizes(key_blocks, counts, num_keys, key_block_size, key_length)
        has_tail = tail.expand(batch, heads).to(torch.int32, memory_format=torch.contiguous_format)
        pooled_key, pooled_value = (
            _descriptor(block_means(x, key_block_size, key_length)[0].to(x.dtype), TILE.value) for x in (key, value)
        )
    with torch.cuda.device(query.device):
        attention_kernel[(counts.shape[2], batch * heads)](
            _descriptor(query, ROWS.value),
            _descriptor(key, key_block_size),
            _descriptor(value, key_block_size),
            _descriptor(out, ROWS.value),
            pooled_key,
            pooled_value,
            lse if return_lse else None,
            key_blocks,
            counts,
            key_length,
            has_tail,
            tail_sizes,
            *key_blocks.stride(),
            *counts.stride(),
            heads,
            num_queries,
            num_keys,
            scale * LOG2_E,
            HEAD_DIM=head_dim,
            KEY_BLOCK=key_block_size,
            STAGES=STAGES[head_dim],
            num_warps=4,
        )
    return out, lse


def _tail_sizes(
    key_blocks: Tensor, counts: Tensor, num_keys: int, key_block_size: int, key_length: Tensor | None
) -> Tensor:
    """How many tokens each block's mean stands for, [B, H, Q, K'] uint8: 0 where the block is listed, or is none."""
    sizes = block_token_counts(num_keys, key_block_size, key_length, key_blocks.device)
    # Whole tiles of them, and one at least that belongs to no block: entries beyond a count go there.
    num_padded = ((num_keys // key_block_size + 1) // TILE.value + 1) * TILE.value
    sizes = F.pad(sizes, (0, num_padded - sizes.shape[1])).to(torch.uint8)
    is_listed = torch.arange(key_blocks.shape[-1], device=counts.device) < counts[..., None]
    index = key_blocks.where(is_listed, num_padded - 1).long()
    return sizes[:, None, None].repeat(len(counts) // len(sizes), *counts.shape[1:], 1).scatter_(-1, index, 0)


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """What the copy engine needs to take `rows` rows of x [B, H, S, D] at a time: zeros beyond the last row."""
    # Strides of sizes of 1 mean nothing, and may be any number.
    strides = [stride if size > 1 else x.shape[3] for size, stride in zip(x.shape[:3], x.stride())]
    if x.stride(3) != 1 or x.data_ptr() % 16 or any(stride == 0 or stride % 8 for stride in strides):
        x = x.clone(memory_format=torch.contiguous_format)
        strides = list(x.stride()[:3])
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, x.shape[3]], SHARED_LAYOUT.value)


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
    means follow the listed ones.
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

    dtype: gl.constexpr = query_desc.dtype
    query_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], SHARED_LAYOUT)
    key_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], SHARED_LAYOUT)
    value_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], SHARED_LAYOUT)
    query_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(query_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(i), count=1)
        mbarrier.init(value_ready.index(i), count=1)
        # Both warpgroups arrive.
        mbarrier.init(key_free.index(i), count=2)
        mbarrier.init(value_free.index(i), count=2)

    keys = (key_tiles, key_ready, key_free)
    values = (value_tiles, value_ready, value_free)
    queries = (query_tiles, query_ready)
    lists = (list_ptr, lists_stride_c, num_tiles, num_missing, ragged_place)
    tail = (num_tail_tiles, tail_sizes_ptr)
    softmax = (logit_scale, first_size, None if key_length_ptr is None else length)
    place = (b, h, row)
    results = (out_desc, lse_ptr, head_of_batch, num_queries)
    descs = (query_desc, key_desc, value_desc, pooled_key_desc, pooled_value_desc)
    gl.warp_specialize(
        [
            (_compute, (queries, keys, values, lists, tail, softmax, place, results, KEY_BLOCK, 0)),
            (_compute, (queries, keys, values, lists, tail, softmax, place, results, KEY_BLOCK, 1)),
            (_copy, (queries, keys, values, lists, num_tail_tiles, place, descs, KEY_BLOCK)),
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
def _copy(queries, keys, values, lists, num_tail_tiles, place, descs, KEY_BLOCK: gl.constexpr):
    """Copy the query block, then tile after tile of keys and values as they become free. Runs in one warp."""
    query_tiles, query_ready = queries
    num_tiles = lists[2]
    b, h, row = place
    query_desc, key_desc, value_desc, pooled_key_desc, pooled_value_desc = descs
    mbarrier.expect(query_ready, 2 * query_desc.block_type.nbytes)
    for i in gl.static_range(2):
        first_query = (2 * row + i) * ROWS
        tma.async_copy_global_to_shared(query_desc, [b, h, first_query, 0], query_ready, query_tiles.index(i))
    for tile in range(num_tiles):
        first, second = _blocks_of(tile, lists, KEY_BLOCK)
        _copy_tile(key_desc, b, h, first * KEY_BLOCK, second * KEY_BLOCK, keys, tile, KEY_BLOCK)
        _copy_tile(value_desc, b, h, first * KEY_BLOCK, second * KEY_BLOCK, values, tile, KEY_BLOCK)
    if pooled_key_desc is not None:
        for i in range(num_tail_tiles):
            _copy_tile(pooled_key_desc, b, h, i * TILE, 0, keys, num_tiles + i, TILE)
            _copy_tile(pooled_value_desc, b, h, i * TILE, 0, values, num_tiles + i, TILE)


@gluon.jit
def _copy_tile(desc, b, h, first, second, ring, tile, KEY_BLOCK: gl.constexpr):
    """Copy rows [TILE, D] of one head: those from `first` on, then, of small blocks, those from `second` on."""
    tiles, ready, free = ring
    STAGES: gl.constexpr = tiles.shape[0]
    stage, phase = tile % STAGES, (tile // STAGES) & 1
    rows = tiles.index(stage)
    # The phase before the first counts as passed: nothing has to be freed in the first round.
    mbarrier.wait(free.index(stage), phase ^ 1)
    mbarrier.expect(ready.index(stage), TILE // KEY_BLOCK * desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [b, h, first, 0], ready.index(stage), rows.slice(0, KEY_BLOCK))
    if KEY_BLOCK < TILE:
        tma.async_copy_global_to_shared(desc, [b, h, second, 0], ready.index(stage), rows.slice(KEY_BLOCK, KEY_BLOCK))


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
def _compute(queries, keys, values, lists, tail, softmax, place, results, KEY_BLOCK: gl.constexpr, PART: gl.constexpr):
    """Attention of one half of the query block. Runs in one warpgroup.

    The product of a tile's weights and values runs together with the next tile's softmax.
    """
    query_tiles, query_ready = queries
    key_tiles, key_ready, key_free = keys
    value_tiles, value_ready, _ = values
    num_tiles, num_missing = lists[2], lists[3]
    num_tail_tiles, tail_sizes_ptr = tail
    logit_scale, first_size, key_length = softmax
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
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, logits_layout))

    second_size = KEY_BLOCK
    if key_length is not None:
        first_size, second_size = _sizes_of(0, lists, key_length, KEY_BLOCK)
    mbarrier.wait(query_ready, 0)
    mbarrier.wait(key_ready.index(0), 0)
    # [ROWS, TILE]
    logits = warpgroup_mma(query, key_tiles.index(0).permute((1, 0)), no_logits, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(0, deps=[logits])
    mbarrier.arrive(key_free.index(0), count=1)
    exists = _exists(columns, first_size, gl.where(num_missing == 0, second_size, 0), KEY_BLOCK)
    logits = gl.where(exists[None, :], logits, -float("inf"))
    peak = gl.maximum(gl.max(logits, 1) * logit_scale, NO_PEAK)
    weights = gl.exp2(logits * logit_scale - peak[:, None])
    total = gl.sum(weights, 1)
    weights = gl.convert_layout(weights.to(dtype), weights_layout)
    mbarrier.wait(value_ready.index(0), 0)

    for tile in range(1, num_tiles):
        sizes = None
        if key_length is not None:
            sizes = _sizes_of(tile, lists, key_length, KEY_BLOCK)
        weights, numerator, peak, total = _take_tile(
            tile, query, keys, values, weights, numerator, peak, total, logit_scale, columns, sizes, None, KEY_BLOCK
        )
    if tail_sizes_ptr is not None:
        for i in range(num_tail_tiles):
            means_ptr = tail_sizes_ptr + i * TILE
            weights, numerator, peak, total = _take_tile(
                num_tiles + i,
                query,
                keys,
                values,
                weights,
                numerator,
                peak,
                total,
                logit_scale,
                columns,
                None,
                means_ptr,
                KEY_BLOCK,
            )

    last_stage = (num_tiles + num_tail_tiles - 1) % STAGES
    numerator = warpgroup_mma(weights, value_tiles.index(last_stage), numerator, is_async=True)
    numerator = warpgroup_mma_wait(0, deps=[numerator])
    # Where nothing is seen the numerator is 0, and stays it.
    share = gl.where(total > 0, 1.0 / total, 1.0)
    out = numerator * gl.convert_layout(share, out_rows)[:, None]
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


@gluon.jit
def _take_tile(
    tile,
    query,
    keys,
    values,
    weights,
    numerator,
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
    """
    key_tiles, key_ready, key_free = keys
    value_tiles, value_ready, value_free = values
    STAGES: gl.constexpr = key_tiles.shape[0]
    stage, phase, last_stage = tile % STAGES, (tile // STAGES) & 1, (tile - 1) % STAGES
    # The products' own layouts.
    logits_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    no_logits = gl.zeros([ROWS, TILE], gl.float32, logits_layout)
    mbarrier.wait(key_ready.index(stage), phase)
    logits = warpgroup_mma(query, key_tiles.index(stage).permute((1, 0)), no_logits, use_acc=False, is_async=True)
    numerator = warpgroup_mma(weights, value_tiles.index(last_stage), numerator, is_async=True)
    if means_ptr is not None:
        num_tokens = gl.load(means_ptr + columns)
    logits = warpgroup_mma_wait(1, deps=[logits])
    mbarrier.arrive(key_free.index(stage), count=1)
    if sizes is not None:  # noqa: SIM102 (the compiler would look at both halves)
        if gl.minimum(sizes[0], sizes[1]) < KEY_BLOCK:
            logits = gl.where(_exists(columns, sizes[0], sizes[1], KEY_BLOCK)[None, :], logits, -float("inf"))
    if means_ptr is not None:
        logits = logits * scale + gl.log2(num_tokens.to(gl.float32))[None, :]
        scale = 1.0
    new_peak = gl.maximum(peak, gl.max(logits, 1) * scale)
    fade = gl.exp2(peak - new_peak)
    new_weights = gl.exp2(logits * scale - new_peak[:, None])
    total = total * fade + gl.sum(new_weights, 1)
    # Waiting for the values here and not in the next round keeps ptxas from moving the softmax behind what follows.
    mbarrier.wait(value_ready.index(stage), phase)
    numerator = warpgroup_mma_wait(0, deps=[numerator])
    mbarrier.arrive(value_free.index(last_stage), count=1)
    weights = gl.convert_layout(new_weights.to(weights.dtype), weights.type.layout)
    numerator = numerator * gl.convert_layout(fade, gl.SliceLayout(1, numerator.type.layout))[:, None]
    return weights, numerator, new_peak, total


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

"""The Triton kernel of block-sparse attention: online softmax over the listed key blocks, then over the pooled tail.

One program a query block. It is held to `block_sparse_eager.py`, which is the specification. The online softmax is
that of FlashAttention-2 (arXiv:2307.08691), in base 2 with the scale folded into the exponent. Keys and values come
through the tensor memory accelerator where `tuning.py` says that it pays, by pointers elsewhere.
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

import triton
import triton.language as tl

from diffsparse.kernels.quantization_triton import rounded
from diffsparse.kernels.rows_triton import load_in_halves, load_packed, load_rows, unpacked

LN_2 = tl.constexpr(0.6931471805599453)
LIST_CHUNK = tl.constexpr(128)
# Weights, at most 1, are taken times 2 ** 8 before they are rounded to FP8, whose largest number is 448, and times 127
# before they are rounded to INT8.
FP8_BOOST = tl.constexpr(8.0)
INT8_BOOST = tl.constexpr(6.988684686772166)
# Blocks of nothing have a scale of nearly 0, and two of them one of 0: that times -inf is not a number.
LEAST_SCALE = tl.constexpr(1e-37)


# Another resolution, batch or number of heads compiles nothing anew.
@triton.jit(
    do_not_specialize=[
        "query_order_stride_h",
        "lists_stride_b",
        "lists_stride_h",
        "lists_stride_q",
        "counts_stride_b",
        "counts_stride_h",
        "counts_stride_q",
        "heads",
        "num_queries",
        "num_keys",
        "num_blocks",
    ]
)
def attention_kernel(
    query_ptr,
    keys,
    values,
    out_ptr,
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
    num_blocks,
    logit_scale,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_TILE: tl.constexpr,
    TAIL_TILE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """One query block of one head, which one says the schedule. Optional pointers are None where there is nothing.

    `query_order_ptr` says where the queries come from, unless they are quantized and in order already, and where the
    rows of the output go.

    `keys` and `values` are descriptors or pointers. VALUES is "native", "int8" or "fp8": values of 8 bits lie
    transposed, [B, H, D, S], as the matrix instructions want them. The scales of query and key are per block,
    [B, H, blocks]; that of value is [B, H, D].
    """
    num_rows = tl.cdiv(num_queries, QUERY_BLOCK)
    row_of_all = tl.load(schedule_ptr + tl.program_id(0))
    row, head_of_batch = row_of_all % num_rows, (row_of_all // num_rows).to(tl.int64)
    b, h = head_of_batch // heads, head_of_batch % heads
    if not DESCRIPTORS:
        keys += b * key_stride_b + h * key_stride_h
        values += b * value_stride_b + h * value_stride_h
    length = num_keys
    if key_length_ptr is not None:
        length = tl.minimum(tl.load(key_length_ptr + b), num_keys)

    first_query = row * QUERY_BLOCK
    query_ptr += b * query_stride_b + h * query_stride_h
    first_query_ptr = query_ptr + first_query.to(tl.int64) * query_stride_s
    if query_order_ptr is not None:
        query_order_ptr += h * query_order_stride_h
    PACKED: tl.constexpr = query_ptr.dtype.element_ty == tl.uint8
    remaining = num_queries - first_query
    # [QUERY_BLOCK, PADDED_DIM]
    if PACKED:
        query = load_packed(first_query_ptr, remaining, query_stride_s, QUERY_BLOCK, HEAD_DIM, PADDED_DIM)
    elif query_order_ptr is not None and query_scale_ptr is None:
        mask, offsets = _rows_of_queries(
            first_query, num_queries, query_order_ptr, query_stride_s, QUERY_BLOCK, HEAD_DIM, PADDED_DIM
        )
        query = tl.load(query_ptr + offsets, mask=mask, other=0.0)
    else:
        query = load_rows(first_query_ptr, remaining, query_stride_s, QUERY_BLOCK, HEAD_DIM, PADDED_DIM)
    query_scale = logit_scale
    if query_scale_ptr is not None:
        query_scale *= tl.load(query_scale_ptr + row_of_all)
        key_scale_ptr += head_of_batch * num_blocks
    peak = tl.full([QUERY_BLOCK], -float("inf"), tl.float32)
    # INT8 weights are divided by the sum of what they were rounded to; the logsumexp takes the exact one.
    total = tl.zeros([QUERY_BLOCK], tl.float32)
    exact_total = tl.zeros([QUERY_BLOCK], tl.float32)
    EXACT: tl.constexpr = VALUES == "int8" and lse_ptr is not None
    BOOST: tl.constexpr = FP8_BOOST if VALUES == "fp8" else (INT8_BOOST if VALUES == "int8" else 0.0)
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
                scale = _at_least(LEAST_SCALE, scale * tl.load(key_scale_ptr + last))
            for tile in range(TILES):
                peak, total, exact_total, numerator = _take_tile(
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
                    exact_total,
                    numerator,
                    KEY_TILE,
                    HEAD_DIM,
                    PADDED_DIM,
                    DESCRIPTORS,
                    PACKED,
                    True,
                    VALUES,
                    EXACT,
                )
    num_others = count - (skipped < count).to(tl.int32)
    # The next entry is read a tile ahead: what waits for it would stop the copies of keys and values.
    block, key_scale = _entry(lists_ptr, lists_stride_c, key_scale_ptr, 0, skipped, count)
    for i in range(num_others * TILES):
        first_key = block * KEY_BLOCK + (i % TILES) * KEY_TILE
        scale = query_scale
        if key_scale_ptr is not None:
            scale = _at_least(LEAST_SCALE, scale * key_scale)
        block, key_scale = _entry(lists_ptr, lists_stride_c, key_scale_ptr, (i + 1) // TILES, skipped, count)
        peak, total, exact_total, numerator = _take_tile(
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
            exact_total,
            numerator,
            KEY_TILE,
            HEAD_DIM,
            PADDED_DIM,
            DESCRIPTORS,
            PACKED,
            MASKED,
            VALUES,
            EXACT,
        )
    if VALUES != "native":
        dims = tl.arange(0, PADDED_DIM)
        value_scale = tl.load(value_scale_ptr + head_of_batch * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        numerator *= value_scale[None, :]

    if has_tail_ptr is not None:
        if query_scale_ptr is not None:
            # Means are not quantized, and meet the query that the listed keys have met.
            query = (query.to(tl.float32) * (query_scale / logit_scale)).to(pooled_key_ptr.dtype.element_ty)
        num_means = tl.where(tl.load(has_tail_ptr + head_of_batch) != 0, num_blocks, 0)
        tail_logs_ptr += row_of_all.to(tl.int64) * (num_blocks + 1)
        pooled_key_ptr += head_of_batch * num_blocks * HEAD_DIM
        pooled_value_ptr += head_of_batch * num_blocks * HEAD_DIM
        for first in range(0, num_means, TAIL_TILE):
            remaining = num_blocks - first
            key_tile_ptr, value_tile_ptr = pooled_key_ptr + first * HEAD_DIM, pooled_value_ptr + first * HEAD_DIM
            # [TAIL_TILE, PADDED_DIM]
            if PACKED:
                key = load_in_halves(key_tile_ptr, remaining, TAIL_TILE, HEAD_DIM, PADDED_DIM)
            else:
                key = load_rows(key_tile_ptr, remaining, HEAD_DIM, TAIL_TILE, HEAD_DIM, PADDED_DIM)
            value = load_rows(value_tile_ptr, remaining, HEAD_DIM, TAIL_TILE, HEAD_DIM, PADDED_DIM)
            means = first + tl.arange(0, TAIL_TILE)
            log = tl.load(tail_logs_ptr + means, mask=means < num_blocks, other=-float("inf"))
            logits = tl.dot(query, key.T, input_precision="ieee") * logit_scale + log[None, :]
            logits = tl.where((log >= 0)[None, :], logits, -float("inf"))
            peak, fade, weights = _online_softmax(peak, logits, 1.0, True, BOOST)
            total = total * fade + tl.sum(weights, 1)
            if EXACT:
                exact_total = exact_total * fade + tl.sum(weights, 1)
            numerator = tl.dot(weights.to(value.dtype), value, numerator * fade[:, None], input_precision="ieee")

    # What is not a number stays so.
    sees_some = total != 0
    total = tl.where(sees_some, total, 1.0)
    out = tl.where(sees_some[:, None], numerator / total[:, None], 0.0)
    out_ptr += b * out_stride_b + h * out_stride_h
    mask, offsets = _rows_of_queries(
        first_query, num_queries, query_order_ptr, out_stride_s, QUERY_BLOCK, HEAD_DIM, PADDED_DIM
    )
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
    if lse_ptr is not None:
        if EXACT:
            total = tl.where(sees_some, exact_total, 1.0)
        lse = tl.where(sees_some, (peak + tl.log2(total) - BOOST) * LN_2, -float("inf"))
        exists, places = _places_of_queries(first_query, num_queries, query_order_ptr, QUERY_BLOCK)
        tl.store(lse_ptr + head_of_batch * num_queries + places, lse, mask=exists)


@triton.jit
def _rows_of_queries(
    first_query,
    num_queries,
    query_order_ptr,
    stride,
    QUERY_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """Which numbers [QUERY_BLOCK, PADDED_DIM] of a query block there are, and where they lie in a head."""
    dims = tl.arange(0, PADDED_DIM)
    exists, places = _places_of_queries(first_query, num_queries, query_order_ptr, QUERY_BLOCK)
    return exists[:, None] & (dims < HEAD_DIM)[None, :], places[:, None] * stride + dims[None, :]


@triton.jit
def _places_of_queries(first_query, num_queries, query_order_ptr, QUERY_BLOCK: tl.constexpr):
    """Which queries of a block there are, and their own places [QUERY_BLOCK] int64."""
    places = first_query + tl.arange(0, QUERY_BLOCK)
    exists = places < num_queries
    if query_order_ptr is not None:
        places = tl.load(query_order_ptr + places, mask=exists, other=0)
    return exists, places.to(tl.int64)


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
    exact_total,
    numerator,
    KEY_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    VALUES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Take KEY_TILE keys from `first_key` on into the sums of a softmax; with MASKED only those before `length`."""
    exists = tl.arange(0, KEY_TILE) < length - first_key
    # [KEY_TILE, PADDED_DIM]
    if DESCRIPTORS:
        key = keys.load([b.to(tl.int32), h.to(tl.int32), first_key, 0])
        key = unpacked(key.reshape(KEY_TILE, PADDED_DIM // 2)) if PACKED else key.reshape(KEY_TILE, PADDED_DIM)
    else:
        # Only where a tile starts needs 64 bits; offsets within it cost half the registers.
        tile_ptr = keys + first_key.to(tl.int64) * key_stride_s
        remaining = length - first_key if MASKED else KEY_TILE
        if PACKED:
            key = load_packed(tile_ptr, remaining, key_stride_s, KEY_TILE, HEAD_DIM, PADDED_DIM, MASKED)
        else:
            key = load_rows(tile_ptr, remaining, key_stride_s, KEY_TILE, HEAD_DIM, PADDED_DIM, MASKED)
    # [QUERY_BLOCK, KEY_TILE]
    if key.dtype == tl.int8:
        logits = tl.dot(query, key.T).to(tl.float32)
    else:
        logits = tl.dot(query, key.T, input_precision="ieee")
    if MASKED:
        logits = tl.where(exists[None, :], logits, -float("inf"))
    if VALUES == "int8":
        # Relative to the largest of the tile, not of the row so far: many tiles would be all zeros.
        tile_peak, _, weights = _online_softmax(-float("inf"), logits, scale, MASKED, INT8_BOOST)
        new_peak = tl.maximum(peak, tile_peak)
        shift = _finite(new_peak, MASKED)
        fade, share, peak = tl.exp2(peak - shift), tl.exp2(tile_peak - shift), new_peak
        # Of very large logits the difference may be a little above 0.
        weights = tl.minimum(weights, 127.0, propagate_nan=tl.PropagateNan.ALL)
        if EXACT:
            exact_total = exact_total * fade + tl.sum(weights, 1) * share
        weights = rounded(weights)
        total = total * fade + tl.sum(weights, 1) * share
    else:
        boost: tl.constexpr = FP8_BOOST if VALUES == "fp8" else 0.0
        peak, fade, weights = _online_softmax(peak, logits, scale, MASKED, boost)
        total = total * fade + tl.sum(weights, 1)
    numerator *= fade[:, None]
    if VALUES != "native":
        # [PADDED_DIM, KEY_TILE]; what lies beyond the length is zero.
        if DESCRIPTORS:
            value = values.load([b.to(tl.int32), h.to(tl.int32), 0, first_key]).reshape(PADDED_DIM, KEY_TILE)
        else:
            dims = tl.arange(0, PADDED_DIM)[:, None]
            value_ptr = values + first_key + dims * value_stride + tl.arange(0, KEY_TILE)[None, :]
            value = tl.load(value_ptr, mask=(dims < HEAD_DIM) & exists[None, :], other=0.0)
        if VALUES == "int8":
            numerator += tl.dot(weights.to(tl.int8), value.T).to(tl.float32) * share[:, None]
        else:
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
            value = load_rows(tile_ptr, remaining, value_stride, KEY_TILE, HEAD_DIM, PADDED_DIM, MASKED)
        numerator = tl.dot(weights.to(value.dtype), value, numerator, input_precision="ieee")
    return peak, total, exact_total, numerator


@triton.jit
def _online_softmax(peak, logits, scale, MASKED: tl.constexpr, BOOST: tl.constexpr):
    """The new peak of `scale` x logits [n, k], in base 2, what older sums shrink by, and 2 ** BOOST x the weights."""
    new_peak = tl.maximum(peak, tl.max(logits, 1) * scale)
    shift = _finite(new_peak, MASKED)
    fade = tl.exp2(peak - shift)
    if BOOST != 0.0:
        shift -= BOOST
    return new_peak, fade, tl.exp2(logits * scale - shift[:, None])


@triton.jit
def _at_least(least, x):
    """The larger of the two, or NaN where x is."""
    return tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _finite(peak, MASKED: tl.constexpr):
    """What to take off logits: before anything is seen the peak is -inf, and -inf - -inf is not a number."""
    if MASKED:
        peak = tl.where(peak == -float("inf"), 0.0, peak)
    return peak


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

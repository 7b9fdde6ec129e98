"""A computing warpgroup of the Hopper kernel: attention of one half of a query block."""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from diffsparse.kernels.hopper_lists_gluon import TILE, existing, sizes_of
from diffsparse.kernels.hopper_products_gluon import (
    INT_OFFSET,
    ROWS,
    as_float,
    as_operands,
    online_softmax,
    parts_of,
    product_layout,
    scaled,
    start_logits,
    start_product,
)
from diffsparse.kernels.hopper_tiles_gluon import row_layout

LN_2 = gl.constexpr(0.6931471805599453)
# The least a row's largest logit is taken for, in base 2: -inf - -inf, where nothing is seen, is not a number.
NO_PEAK = gl.constexpr(-1e30)
# Blocks of nothing have a scale of nearly 0, and two of them one of 0: that times -inf is not a number.
LEAST_SCALE = gl.constexpr(1e-37)
# FP8 weights are taken times 2 ** 8: `quantization.py`, WEIGHT_SCALE.
FP8_BOOST = gl.constexpr(8.0)


@gluon.jit
def attend_half(
    queries,
    keys,
    values,
    means,
    lists,
    tail,
    softmax,
    scales,
    rows,
    results,
    KEY_BLOCK: gl.constexpr,
    PART: gl.constexpr,
):
    """Attention of one half of the query block. Runs in one warpgroup.

    The product of a tile's weights and values runs together with the next tile's softmax.
    """
    query_ptr, query_stride, query_order_ptr, query_tiles = queries
    key_tiles, key_ready, key_free = keys
    value_tiles, value_ready, value_free = values
    num_tiles, num_missing = lists[2], lists[3]
    num_tail_tiles, tail_logs_ptr, value_scale_ptr = tail
    logit_scale, first_size, key_length = softmax
    query_scale, key_scales = scales
    row, num_queries = rows
    first_query = (2 * row + PART) * ROWS
    out_ptr, out_stride, out_order_ptr, lse_ptr, out_tiles = results
    STAGES: gl.constexpr = key_tiles.shape[0]
    HEAD_DIM: gl.constexpr = key_tiles.shape[2]
    OUT_DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    QUANTIZED: gl.constexpr = key_scales is not None
    FP8_VALUES: gl.constexpr = value_tiles.dtype == gl.float8e4nv
    BOOST: gl.constexpr = FP8_BOOST if FP8_VALUES else 0.0
    OFFSET: gl.constexpr = INT_OFFSET if key_tiles.dtype == gl.int8 else 0.0
    logits_layout: gl.constexpr = product_layout(TILE, key_tiles.dtype)
    out_layout: gl.constexpr = product_layout(HEAD_DIM, value_tiles.dtype)
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)

    query = query_tiles.index(PART)  # [ROWS, HEAD_DIM]
    numerator = gl.zeros([ROWS, HEAD_DIM], gl.float32, out_layout)
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, logits_layout))
    peak = gl.full([ROWS], NO_PEAK, gl.float32, gl.SliceLayout(1, logits_layout))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, logits_layout))

    second_size = KEY_BLOCK
    if key_length is not None:
        first_size, second_size = sizes_of(0, lists, key_length, KEY_BLOCK)
    scale = logit_scale * query_scale if QUANTIZED else logit_scale
    QUERY_ROWS: gl.constexpr = row_layout(query_tiles.dtype, HEAD_DIM)
    places, exists = _places(first_query, num_queries, query_order_ptr, query_stride, HEAD_DIM, QUERY_ROWS)
    query.store(gl.load(query_ptr + places, mask=exists, other=0.0))
    fence_async_shared()
    mbarrier.wait(key_ready.index(0), 0)
    tile_scales = _scales_of(0, scale, key_scales, KEY_BLOCK)
    # [ROWS, TILE]
    logits = warpgroup_mma_wait(0, deps=[start_logits(query, key_tiles.index(0))])
    mbarrier.arrive(key_free.index(0), count=1)
    exists = existing(columns, first_size, gl.where(num_missing == 0, second_size, 0), KEY_BLOCK)
    logits = gl.where(exists[None, :], as_float(logits), -float("inf"))
    peak, fade, weights, total = online_softmax(parts_of(logits, tile_scales), peak, total, OFFSET, BOOST)
    weights = as_operands(weights, value_tiles.dtype, out_layout)
    mbarrier.wait(value_ready.index(0), 0)

    for tile in range(1, num_tiles):
        sizes = None
        if key_length is not None:
            sizes = sizes_of(tile, lists, key_length, KEY_BLOCK)
        weights, numerator, fade, peak, total = _take_tile(
            tile,
            query,
            keys,
            key_scales,
            values,
            weights,
            numerator,
            fade,
            peak,
            total,
            scale,
            columns,
            sizes,
            None,
            KEY_BLOCK,
        )
    last_tile = num_tiles - 1
    if tail_logs_ptr is not None and not QUANTIZED:
        for i in range(num_tail_tiles):
            logs_ptr = tail_logs_ptr + i * TILE
            weights, numerator, fade, peak, total = _take_tile(
                num_tiles + i,
                query,
                keys,
                None,
                values,
                weights,
                numerator,
                fade,
                peak,
                total,
                scale,
                columns,
                None,
                logs_ptr,
                KEY_BLOCK,
            )
        last_tile += num_tail_tiles

    product = warpgroup_mma_wait(0, deps=[start_product(weights, value_tiles, last_tile % STAGES, numerator)])
    numerator = numerator * gl.convert_layout(fade, out_rows)[:, None] + product if FP8_VALUES else product
    if value_scale_ptr is not None:
        value_scale = gl.load(value_scale_ptr + gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, out_layout)))
        numerator = numerator * value_scale[None, :]
    if tail_logs_ptr is not None and QUANTIZED:
        # Means are not quantized, and meet the query that the listed keys have met.
        if num_tail_tiles > 0:
            out_tiles.index(PART).store(scaled(query, query_scale, OUT_DTYPE))
            fence_async_shared()
        # Arriving waits for the other warps, whose rows of the query the products take too.
        mbarrier.arrive(value_free.index(last_tile % STAGES), count=1)
        mean_layout: gl.constexpr = product_layout(HEAD_DIM, OUT_DTYPE)
        mean_rows: gl.constexpr = gl.SliceLayout(1, product_layout(TILE, OUT_DTYPE))
        numerator = gl.convert_layout(numerator, mean_layout)
        peak, total = gl.convert_layout(peak, mean_rows), gl.convert_layout(total, mean_rows)
        for i in range(num_tail_tiles):
            numerator, peak, total = _take_means(
                i, out_tiles.index(PART), means, numerator, peak, total, logit_scale, tail_logs_ptr + i * TILE, BOOST
            )
        numerator = gl.convert_layout(numerator, out_layout)
        peak, total = (
            gl.convert_layout(peak, gl.SliceLayout(1, logits_layout)),
            gl.convert_layout(total, gl.SliceLayout(1, logits_layout)),
        )
    # Where nothing is seen the numerator is 0, and stays it.
    share = gl.where(total > 0, 1.0 / total, 1.0)
    out = numerator * gl.convert_layout(share, out_rows)[:, None]
    # The queries have been used for the last time, and make room: there a row's numbers come side by side.
    OUT_ROWS: gl.constexpr = row_layout(OUT_DTYPE, HEAD_DIM)
    out_tiles.index(PART).store(out.to(OUT_DTYPE))
    places, exists = _places(first_query, num_queries, out_order_ptr, out_stride, HEAD_DIM, OUT_ROWS)
    gl.store(out_ptr + places, out_tiles.index(PART).load(OUT_ROWS), mask=exists)
    if lse_ptr is not None:
        tokens, exists = _tokens(first_query, num_queries, out_order_ptr, gl.SliceLayout(1, logits_layout))
        gl.store(lse_ptr + tokens, (peak + gl.log2(total) - BOOST) * LN_2, mask=exists)


@gluon.jit
def _places(first_query, num_queries, order_ptr, stride, HEAD_DIM: gl.constexpr, layout: gl.constexpr):
    """Where in a head the numbers of half a query block lie, [ROWS, HEAD_DIM], and which of its rows there are."""
    tokens, exists = _tokens(first_query, num_queries, order_ptr, gl.SliceLayout(1, layout))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, layout))
    return tokens[:, None] * stride + dims[None, :], exists[:, None]


@gluon.jit
def _tokens(first_query, num_queries, order_ptr, layout: gl.constexpr):
    """The tokens of half a query block, [ROWS] int64, and which of them there are."""
    tokens = first_query + gl.arange(0, ROWS, layout=layout)
    exists = tokens < num_queries
    if order_ptr is not None:
        tokens = gl.load(order_ptr + tokens, mask=exists, other=0)
    return tokens.to(gl.int64), exists


@gluon.jit
def _take_tile(
    tile,
    query,
    keys,
    key_scales,
    values,
    weights,
    numerator,
    fade,
    peak,
    total,
    scale,
    columns,
    sizes,
    logs_ptr,
    KEY_BLOCK: gl.constexpr,
):
    """Take the last tile's weights [ROWS, TILE] into the numerator, this tile's into the total.

    The scale of each of the tile's blocks in `key_scales`, None if nothing is quantized, comes to `scale`.

    `sizes` is how many keys of each of the tile's blocks exist, None if all do. At `logs_ptr` is the log2 of how many
    tokens each key is the mean of, None if none is one.

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
    scales = _scales_of(stage, scale, key_scales, KEY_BLOCK)
    logits = start_logits(query, key_tiles.index(stage))
    product = start_product(weights, value_tiles, last_stage, numerator)
    if logs_ptr is not None:
        logs = gl.load(logs_ptr + columns)
    logits = warpgroup_mma_wait(len(weights), deps=[logits])
    mbarrier.arrive(key_free.index(stage), count=1)
    logits = as_float(logits)
    if sizes is not None:  # noqa: SIM102 (the compiler would look at both halves)
        if gl.minimum(sizes[0], sizes[1]) < KEY_BLOCK:
            logits = gl.where(existing(columns, sizes[0], sizes[1], KEY_BLOCK)[None, :], logits, -float("inf"))
    if logs_ptr is not None:
        logits = logits * scale + logs[None, :]
        scales = [1.0]
    peak, new_fade, new_weights, total = online_softmax(parts_of(logits, scales), peak, total, OFFSET, BOOST)
    # Waiting for the values here and not in the next round keeps ptxas from moving the softmax behind what follows.
    mbarrier.wait(value_ready.index(stage), phase)
    product = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(value_free.index(last_stage), count=1)
    weights = as_operands(new_weights, value_tiles.dtype, out_layout)
    if FP8_VALUES:
        numerator = numerator * gl.convert_layout(fade, gl.SliceLayout(1, out_layout))[:, None] + product
    else:
        numerator = product * gl.convert_layout(new_fade, gl.SliceLayout(1, out_layout))[:, None]
    return weights, numerator, new_fade, peak, total


@gluon.jit
def _scales_of(stage, scale, key_scales, KEY_BLOCK: gl.constexpr):
    """What a tile's logits are multiplied by: `scale`, and of quantized keys the scale of each block."""
    if key_scales is None:
        scales = [scale]
    elif KEY_BLOCK == TILE:
        scales = [_scale_of(stage, scale, key_scales)]
    else:
        scales = [_scale_of(2 * stage, scale, key_scales), _scale_of(2 * stage + 1, scale, key_scales)]
    return scales


@gluon.jit
def _scale_of(place, scale, key_scales):
    key_scale = gl.max(key_scales.index(place).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    return _at_least(LEAST_SCALE, scale * key_scale)


@gluon.jit
def _at_least(least, x):
    """The larger of the two, or NaN where x is."""
    return gl.where(x < least, least, x)


@gluon.jit
def _take_means(tile, query, means, numerator, peak, total, scale, logs_ptr, BOOST: gl.constexpr):
    """Take a tile of block means into the sums. At `logs_ptr` is the log2 of how many tokens each is the mean of."""
    mean_keys, mean_values, ready, free = means
    STAGES: gl.constexpr = mean_keys.shape[0]
    stage, phase = tile % STAGES, (tile // STAGES) & 1
    mbarrier.wait(ready.index(stage), phase)
    layout: gl.constexpr = numerator.type.layout
    logits_layout: gl.constexpr = product_layout(TILE, mean_keys.dtype)
    logits = start_logits(query, mean_keys.index(stage))
    logs = gl.load(logs_ptr + gl.arange(0, TILE, layout=gl.SliceLayout(0, logits_layout)))
    logits = warpgroup_mma_wait(0, deps=[logits])
    logits = logits * scale + logs[None, :]
    peak, fade, weights, total = online_softmax(((logits, 1.0),), peak, total, 0.0, BOOST)
    weights = as_operands(weights, mean_values.dtype, layout)[0]
    numerator = numerator * gl.convert_layout(fade, gl.SliceLayout(1, layout))[:, None]
    numerator = warpgroup_mma(weights, mean_values.index(stage), numerator, is_async=True)
    numerator = warpgroup_mma_wait(0, deps=[numerator])
    mbarrier.arrive(free.index(stage), count=1)
    return numerator, peak, total

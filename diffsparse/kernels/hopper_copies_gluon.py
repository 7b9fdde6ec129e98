"""The copying warp of the Hopper kernel: tiles of keys and values into a ring in shared memory as they become free."""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from diffsparse.kernels.hopper_lists_gluon import TILE, blocks_of
from diffsparse.kernels.hopper_tiles_gluon import load_tile


@gluon.jit
def copy_tiles(keys, values, means, lists, scales, num_tail_tiles, place, descs, KEY_BLOCK: gl.constexpr):
    """Copy tile after tile of keys and values as they become free. Runs in one warp.

    The scale of each quantized block goes beside its tile.
    """
    key_scales, key_scale_ptr = scales
    num_tiles = lists[2]
    b, h = place
    key_desc, value_desc, pooled_key_desc, pooled_value_desc = descs
    FP8_VALUES: gl.constexpr = value_desc.dtype == gl.float8e4nv
    for tile in range(num_tiles):
        first, second = blocks_of(tile, lists, KEY_BLOCK)
        block_scales = None
        if key_scale_ptr is not None:
            block_scales = (gl.load(key_scale_ptr + first), gl.load(key_scale_ptr + second))
        first, second = first * KEY_BLOCK, second * KEY_BLOCK
        _copy_tile(key_desc, b, h, first, second, keys, tile, KEY_BLOCK, key_scales, block_scales)
        _copy_tile(value_desc, b, h, first, second, values, tile, KEY_BLOCK, None, None, FP8_VALUES)
    if means[0] is not None:
        _copy_means(pooled_key_desc, pooled_value_desc, b, h, keys, values, means, num_tiles, num_tail_tiles)
    elif pooled_key_desc is not None:
        for i in range(num_tail_tiles):
            _copy_tile(pooled_key_desc, b, h, i * TILE, 0, keys, num_tiles + i, TILE, None, None)
            _copy_tile(pooled_value_desc, b, h, i * TILE, 0, values, num_tiles + i, TILE, None, None)


@gluon.jit
def _copy_tile(
    desc,
    b,
    h,
    first,
    second,
    ring,
    tile,
    KEY_BLOCK: gl.constexpr,
    scales,
    block_scales,
    TRANSPOSED: gl.constexpr = False,
):
    """Copy rows [TILE, D] of one head: those from `first` on, then, of small blocks, those from `second` on.

    `block_scales` that are not None are there for whoever has passed the barrier.
    """
    tiles, ready, free = ring
    PARTS: gl.constexpr = TILE // KEY_BLOCK
    STAGES: gl.constexpr = tiles.shape[0] // PARTS if TRANSPOSED else tiles.shape[0]
    stage, phase = tile % STAGES, (tile // STAGES) & 1
    # The phase before the first counts as passed: nothing has to be freed in the first round.
    mbarrier.wait(free.index(stage), phase ^ 1)
    if block_scales is not None:
        for i in gl.static_range(PARTS):
            block_scale = gl.full([1], block_scales[i], gl.float32, gl.BlockedLayout([1], [32], [1], [0]))
            scales.index(stage * PARTS + i).store(block_scale)
    mbarrier.expect(ready.index(stage), PARTS * desc.block_type.nbytes)
    firsts = (first, second)
    for i in gl.static_range(PARTS):
        if TRANSPOSED:
            load_tile(desc, [b, h, 0, firsts[i]], ready.index(stage), tiles.index(stage * PARTS + i))
        else:
            rows = tiles.index(stage).slice(i * KEY_BLOCK, KEY_BLOCK)
            load_tile(desc, [b, h, firsts[i], 0], ready.index(stage), rows)


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
        load_tile(key_desc, first, ready.index(stage), mean_keys.index(stage))
        load_tile(value_desc, first, ready.index(stage), mean_values.index(stage))

"""The two matrix products of the Hopper kernel and the softmax between them, for one warpgroup, in any precision."""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from diffsparse.kernels.hopper_lists_gluon import TILE

# A warpgroup multiplies 64 rows at a time: two of them share a query block.
ROWS = gl.constexpr(64)
# Sums of INT8 products start here: their bits are those of the fp32 number 1.5 * 2 ** 23 more, which costs nothing.
INT_START = gl.constexpr(0x4B400000)
INT_OFFSET = gl.constexpr(12582912.0)


@gluon.constexpr_function
def product_layout(columns, dtype):
    """How a warpgroup holds the product of [ROWS, n] and [n, columns] of a dtype."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 256 // dtype.primitive_bitwidth])


@gluon.jit
def start_logits(query, key_tile):
    """Products [ROWS, TILE] of queries and keys, not waited for; those of INT8 start at INT_START."""
    layout: gl.constexpr = product_layout(TILE, key_tile.dtype)
    if key_tile.dtype == gl.int8:
        start = gl.full([ROWS, TILE], INT_START, gl.int32, layout)
        logits = warpgroup_mma(query, key_tile.permute((1, 0)), start, is_async=True)
    else:
        start = gl.zeros([ROWS, TILE], gl.float32, layout)
        logits = warpgroup_mma(query, key_tile.permute((1, 0)), start, use_acc=False, is_async=True)
    return logits


@gluon.jit
def as_float(logits):
    """Products of `start_logits` as fp32; those of INT8 are INT_OFFSET too large."""
    if logits.dtype == gl.int32:
        logits = logits.to(gl.float32, bitcast=True)
    return logits


@gluon.jit
def parts_of(logits, scales):
    """Logits [ROWS, TILE] with their scale; with two scales the halves, each with its own."""
    if len(scales) == 1:
        parts = ((logits, scales[0]),)
    else:
        first, second = gl.split(logits.reshape([ROWS, 2, TILE // 2]).permute((0, 2, 1)))
        parts = ((first, scales[0]), (second, scales[1]))
    return parts


@gluon.jit
def online_softmax(parts, peak, total, OFFSET: gl.constexpr, BOOST: gl.constexpr):
    """The new peak, in base 2, what older sums shrink by, the weights times 2 ** BOOST, and their new total.

    `parts` are those of `parts_of`, logits OFFSET too large; the weights come in such parts.
    """
    new_peak = peak
    for i in gl.static_range(len(parts)):
        logits, scale = parts[i]
        largest = gl.convert_layout(gl.max(logits, 1), peak.type.layout, assert_trivial=True)
        if OFFSET != 0.0:
            largest = largest - OFFSET
        new_peak = gl.maximum(new_peak, largest * scale)
    fade = gl.exp2(peak - new_peak)
    weights = [_weights(part, new_peak, OFFSET, BOOST) for part in parts]
    sums = weights[0]
    if len(weights) == 2:
        sums = sums + weights[1]
    sums = gl.convert_layout(gl.sum(sums, 1), total.type.layout, assert_trivial=True)
    return new_peak, fade, weights, total * fade + sums


@gluon.jit
def _weights(part, peak, OFFSET: gl.constexpr, BOOST: gl.constexpr):
    logits, scale = part
    shift = peak
    if OFFSET != 0.0:
        shift = shift + OFFSET * scale
    if BOOST != 0.0:
        shift = shift - BOOST
    shift = gl.convert_layout(shift, gl.SliceLayout(1, logits.type.layout), assert_trivial=True)
    return gl.exp2(logits * scale - shift[:, None])


@gluon.jit
def as_operands(weights, dtype: gl.constexpr, out_layout: gl.constexpr):
    """Weights of `online_softmax`, [ROWS, TILE] in all, as `start_product` takes them: in FP8 a part each."""
    if dtype == gl.float8e4nv:
        operands = [_packed(part) for part in weights]
    else:
        whole = weights[0]
        if len(weights) == 2:
            whole = gl.join(whole, weights[1]).permute((0, 2, 1)).reshape([ROWS, TILE])
        operands = [gl.convert_layout(whole.to(dtype), gl.DotOperandLayout(0, out_layout, 2))]
    return operands


@gluon.jit
def _packed(weights):
    """Weights [ROWS, n] in FP8, four in an int32, in the order of `interleaved`: [ROWS, n / 16, 4].

    Bytes that go from one round of a loop to the next would each take a register.
    """
    weights = weights.reshape([ROWS, weights.shape[1] // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4))
    even, odd = gl.split(weights)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return gl.inline_asm_elementwise(
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


@gluon.jit
def start_product(weights, value_tiles, stage, numerator):
    """Products [ROWS, D] of weights and values, not waited for: added to the numerator, but for those of FP8."""
    if value_tiles.dtype == gl.float8e4nv:
        layout: gl.constexpr = numerator.type.layout
        product = gl.zeros([ROWS, numerator.shape[1]], gl.float32, layout)
        for i in gl.static_range(len(weights)):
            operand = _four_bytes(weights[i], layout)
            tile = value_tiles.index(stage * len(weights) + i)
            product = warpgroup_mma(operand, tile.permute((1, 0)), product, use_acc=i > 0, is_async=True)
    else:
        product = warpgroup_mma(weights[0], value_tiles.index(stage), numerator, is_async=True)
    return product


@gluon.jit
def _four_bytes(packed, out_layout: gl.constexpr):
    """FP8 weights [ROWS, n] of `packed` [ROWS, n / 16, 4]."""
    first, second = packed.to(gl.int8), (packed >> 8).to(gl.int8)
    third, fourth = (packed >> 16).to(gl.int8), (packed >> 24).to(gl.int8)
    weights = gl.join(gl.join(first, third), gl.join(second, fourth)).reshape([ROWS, 4 * 4 * packed.shape[1]])
    return gl.convert_layout(weights.to(gl.float8e4nv, bitcast=True), gl.DotOperandLayout(0, out_layout, 4))


@gluon.jit
def scaled(query, scale, dtype: gl.constexpr):
    """Quantized queries [ROWS, D] times their scale."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    return (query.load(layout).to(gl.float32) * scale).to(dtype)

"""Quantized operands of attention: what each precision rounds, and how. The specification of every kernel that does.

A block of queries or keys shares one scale, a channel of values has its own. Keys lose their mean first, which no
softmax notices and without which a few large channels would take most of the range: SageAttention (arXiv:2410.02367)
and SageAttention2 (arXiv:2411.10958). All is rounded to nearest, halves to even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffsparse.kernels.pooling import block_means, block_token_counts


@dataclass(frozen=True)
class Precision:
    """What the two matrix products of attention are computed in.

    Attributes:
        scores: of queries and keys: "native" (the inputs' dtype), "int8", "int4" (stored in half a byte, computed as
            INT8) or "fp8" (e4m3).
        values: of weights and values: "native", "int8" or "fp8".
    """

    scores: str
    values: str


PRECISIONS = {
    "native": Precision("native", "native"),
    "int8": Precision("int8", "native"),
    "int8_int8": Precision("int8", "int8"),
    "int8_fp8": Precision("int8", "fp8"),
    "fp8": Precision("fp8", "fp8"),
    "int4": Precision("int4", "native"),
}
QUANTIZED = tuple(name for name in PRECISIONS if name != "native")
E4M3_MAX = 448.0
INT8_MAX = 127.0
# What weights in [0, 1] are multiplied by before they become e4m3: a power of two, which costs nothing within exp2.
WEIGHT_SCALE = 256.0
# A block or channel of smaller values is taken for zeros: one over its scale would overflow.
LEAST_ABSMAX = 1e-30


@dataclass(frozen=True, eq=False)
class Operands:
    """What attention in a precision computes with, in fp32.

    Attributes:
        query, key, value: [B, H, S, D], quantized and back; keys without their mean, zeros where there is no key.
        key_means, value_means: [B, H, K, D], block means for the pooled tail, which are not quantized; of keys without
            their mean as well, or listed and pooled keys would not stand in one softmax.
        key_mean: [B, H, 1, D]. Logits are smaller by `scale * query . key_mean`: a logsumexp needs it added.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_means: Tensor
    value_means: Tensor
    key_mean: Tensor


def quantized_operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    precision: str,
    query_block_size: int,
    key_block_size: int,
    key_length: Tensor | None = None,
) -> Operands:
    """Query [B, H, S, D], key and value [B, H, S_k, D] as a precision other than "native" sees them.

    Keys at or beyond `key_length` [B] are not read.
    """
    formats = PRECISIONS[precision]
    mean = key_mean(key, key_length)
    smooth = key.float() - mean
    if formats.values != "native":
        channels, scales = quantize_values(value, formats.values, key_length)
        values = (channels.float() * scales[..., None]).mT[:, :, : value.shape[2]]
    else:
        values = _existing(value.float(), key_length)
    return Operands(
        _rounded(query, query_block_size, formats.scores, None),
        _rounded(smooth, key_block_size, formats.scores, key_length),
        values,
        block_means(smooth, key_block_size, key_length)[0],
        block_means(value, key_block_size, key_length)[0],
        mean,
    )


def key_mean(key: Tensor, key_length: Tensor | None = None) -> Tensor:
    """The mean of the keys [B, H, S, D] that exist, [B, H, 1, D] fp32; 0 where none does."""
    return block_means(key, key.shape[2], key_length)[0]


def of_key_mean(query: Tensor, key_mean: Tensor) -> Tensor:
    """Products of queries [B, H, S, D] and the mean key [B, H, 1, D] that quantized keys lack: [B, H, S] fp32.

    Not as a matrix product: autocast would round both to 16 bits, and TF32 to 11.
    """
    return (query * key_mean).sum(-1)


def quantize_blocks(x: Tensor, block_size: int, bits: int, key_length: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Integers of x [B, H, S, D], [B, H, S, D] int8, and the scale of each block of tokens, [B, H, K] fp32.

    x is about `values * scale`. The largest value of a block becomes 127 with 8 bits, 7 with 4. The last block may be
    ragged. Tokens at or beyond `key_length` [B] become 0 and do not count.
    """
    largest = 2.0 ** (bits - 1) - 1
    scaled, scales = _scaled_blocks(x, block_size, largest, key_length)
    return scaled.round().to(torch.int8), scales


def quantize_blocks_fp8(x: Tensor, block_size: int, key_length: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same in e4m3: [B, H, S, D] float8_e4m3fn, the largest value of a block at 448, and [B, H, K] fp32."""
    scaled, scales = _scaled_blocks(x, block_size, E4M3_MAX, key_length)
    return scaled.to(torch.float8_e4m3fn), scales


def quantize_values(value: Tensor, number: str, key_length: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Values [B, H, S, D] in "int8" or "fp8", [B, H, D, S'] contiguous, and the scale of each channel, [B, H, D] fp32.

    Matrix products of 8 bits read values along the tokens. S' is S rounded up to a multiple of 16, as copies by TMA
    want it. What is beyond S or `key_length` [B] is 0.
    """
    largest = INT8_MAX if number == "int8" else E4M3_MAX
    value = _existing(value.float(), key_length)
    absmax = value.abs().amax(dim=2).clamp(min=LEAST_ABSMAX)
    scaled = (value * (largest / absmax)[:, :, None]).mT
    padded = F.pad(scaled, (0, -value.shape[2] % 16))
    rounded = padded.round().to(torch.int8) if number == "int8" else padded.to(torch.float8_e4m3fn)
    return rounded.contiguous(), absmax / largest


def interleaved(values: Tensor) -> Tensor:
    """Quantized values [B, H, D, S'] with pairs of tokens in the order 0 4 1 5 2 6 3 7 of every eight.

    On Hopper a thread holds the same pairs of logits, next to each other: with this no weight has to go to another
    thread.
    """
    return values.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)


def round_weights(weights: Tensor, peak: Tensor) -> Tensor:
    """Softmax weights as they enter an FP8 product: in e4m3, relative to the largest of their row, `peak`.

    A kernel only knows the largest so far, so its roundings are others of the same size.
    """
    return (weights * (WEIGHT_SCALE / peak)).to(torch.float8_e4m3fn).float() * (peak / WEIGHT_SCALE)


def round_weights_int8(weights: Tensor, key_block_size: int) -> Tensor:
    """Softmax weights [..., n] as they enter an INT8 product: 127 steps to the largest of their row in their key block.

    A step relative to the whole row would make zeros of the many small weights of which long sequences consist.
    """
    blocks = F.pad(weights, (0, -weights.shape[-1] % key_block_size)).unflatten(-1, (-1, key_block_size))
    step = blocks.amax(-1, keepdim=True).clamp(min=LEAST_ABSMAX) / INT8_MAX
    return ((blocks / step).round() * step).flatten(-2)[..., : weights.shape[-1]]


def pack_int4(values: Tensor) -> Tensor:
    """Integers [..., D] from -8 to 7 two a byte, [..., ceil(D / 2)] uint8.

    Byte d holds dim d in its lower half and dim d + ceil(D / 2) in its upper half: the two halves of the head dim lie
    apart, and a dot product over each is contiguous.
    """
    half = -(-values.shape[-1] // 2)
    low, high = values[..., :half], F.pad(values[..., half:], (0, values.shape[-1] % 2))
    return ((low & 15) | ((high & 15) << 4)).to(torch.uint8)


def unpack_int4(packed: Tensor, head_dim: int) -> Tensor:
    """What `pack_int4` was given, [..., head_dim] int8."""
    halves = torch.cat([packed & 15, packed >> 4], dim=-1)[..., :head_dim].to(torch.int8)
    return torch.where(halves > 7, halves - 16, halves)


def incoherence(x: Tensor, block_size: int, key_length: Tensor | None = None) -> Tensor:
    """How far the largest of a block of x [B, H, S, D] is above the mean, as max |x| / mean |x|: [B, H] over blocks.

    1 is the least; lower is easier to quantize. Tokens at or beyond `key_length` [B] count in no block's mean, and a
    block of such tokens alone in no number. PAROAttention (arXiv:2506.16054) takes it of blocks of the attention map,
    since it quantizes that by blocks. Here weights are rounded relative to the largest of their row, in INT8 of its
    part in a block; what shares a scale by blocks, and so depends on the order most, is queries and keys: it is for
    these.
    """
    sizes = block_token_counts(x.shape[2], block_size, key_length, x.device)[:, None]  # [B|1, 1, K]
    magnitudes = _in_blocks(_existing(x.float(), key_length).abs(), block_size).flatten(3)
    means = magnitudes.sum(dim=-1) / (sizes * x.shape[3]).clamp(min=1)
    above_least = torch.where(means == 0, 0.0, magnitudes.amax(dim=-1) / means - 1)
    return 1 + above_least.sum(dim=-1) / (sizes > 0).sum(dim=-1).clamp(min=1)


def _rounded(x: Tensor, block_size: int, number: str, key_length: Tensor | None) -> Tensor:
    """x [B, H, S, D] quantized by blocks and back, fp32."""
    if number == "fp8":
        values, scales = quantize_blocks_fp8(x, block_size, key_length)
    else:
        values, scales = quantize_blocks(x, block_size, {"int8": 8, "int4": 4}[number], key_length)
    return values.float() * _of_tokens(scales, block_size, x.shape[2])


def _scaled_blocks(x: Tensor, block_size: int, largest: float, key_length: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [B, H, S, D] fp32 with each block stretched to `largest`, and what a block was divided by, [B, H, K]."""
    x = _existing(x.float(), key_length)
    absmax = _in_blocks(x.abs(), block_size).flatten(3).amax(dim=-1).clamp(min=LEAST_ABSMAX)
    return x * _of_tokens(largest / absmax, block_size, x.shape[2]), absmax / largest


def _existing(x: Tensor, key_length: Tensor | None) -> Tensor:
    """x [B, H, S, D] with 0 at or beyond `key_length` [B]."""
    if key_length is None:
        return x
    beyond = torch.arange(x.shape[2], device=x.device) >= key_length[:, None]
    return x.masked_fill(beyond[:, None, :, None], 0.0)


def _in_blocks(x: Tensor, block_size: int) -> Tensor:
    """x [B, H, S, D] as [B, H, K, block_size, D], zeros after the end."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % block_size)).unflatten(2, (-1, block_size))


def _of_tokens(scales: Tensor, block_size: int, num_tokens: int) -> Tensor:
    """The scale [B, H, K] of each token's block, [B, H, S, 1]."""
    return scales.repeat_interleave(block_size, dim=2)[:, :, :num_tokens, None]

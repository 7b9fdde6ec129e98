"""What the kernels of GPUs multiply: queries, keys and values in order, quantized and pooled."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffsparse.kernels.pooling import block_means
from diffsparse.kernels.quantization import PRECISIONS, key_mean
from diffsparse.kernels.quantization_triton import quantize_blocks, quantize_values
from diffsparse.kernels.reorder import in_order


@dataclass(frozen=True, eq=False)
class Operands:
    """What a kernel multiplies: query and key [B, H, S, D], in INT4 [B, H, S, ceil(D / 2)] as `pack_int4` packs them.

    Value is [B, H, S, D], or quantized [B, H, D, S']. Keys and values are in the order asked for, and so are queries
    that are quantized: others the kernels gather themselves.

    The scales and `key_mean` are those of `quantization.py`, None where nothing is quantized. The means of the blocks
    [B, H, K, D], in the dtype of the inputs and without `key_mean`, are None unless asked for.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_scale: Tensor | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    key_mean: Tensor | None = None
    key_means: Tensor | None = None
    value_means: Tensor | None = None


def prepared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    precision: str,
    query_block_size: int,
    key_block_size: int,
    *,
    key_length: Tensor | None,
    query_order: Tensor | None,
    key_order: Tensor | None,
    pool: bool,
    interleave: bool = False,
) -> Operands:
    """Operands of query, key and value [B, H, S, D]; what is quantized takes one pass each.

    `interleave` is what the Hopper kernel asks of quantized values: `quantization.py`, `interleaved`.
    """
    formats = PRECISIONS[precision]
    # The kernels step by one along the head dim.
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    query_scale = key_scale = value_scale = mean = key_means = value_means = None
    if formats.scores == "native":
        key = in_order(key, key_order)
        if pool:
            key_means = block_means(key, key_block_size, key_length)[0].to(key.dtype)
    else:
        mean = key_mean(key, key_length)
        query, query_scale, _ = quantize_blocks(query, query_block_size, formats.scores, order=query_order)
        key, key_scale, key_means = quantize_blocks(
            key, key_block_size, formats.scores, order=key_order, mean=mean, key_length=key_length, pool=pool
        )
    if formats.values != "native":
        value, value_scale, value_means = quantize_values(
            value,
            key_block_size,
            formats.values,
            order=key_order,
            key_length=key_length,
            pool=pool,
            interleave=interleave,
        )
    else:
        value = in_order(value, key_order)
        if pool:
            value_means = block_means(value, key_block_size, key_length)[0].to(value.dtype)
    return Operands(query, key, value, query_scale, key_scale, value_scale, mean, key_means, value_means)

"""How much of the work of planning is done at a time, so that it needs little memory."""

from __future__ import annotations

from torch import Tensor

from diffsparse.block_mask import num_blocks

PLANNING_BYTES = 1 << 29
"""Memory that planning may take beside query, key and value, if one head or row does not take more."""
TIMES_ON_GPU = 4
"""How much more on a GPU, which waits for the CPU to start the kernels that each slice of heads takes."""
PART_ON_CPU = 16
"""Into how many parts it goes on a CPU, by heads: tensors of less than 32 MiB, whose memory the C library gives again
and again. Of larger ones each page is new, and costs more than to fill it."""


def head_slices(query: Tensor, sampled_rows: int) -> list[slice]:
    """The heads of query [B, H, S, D], a few at a time, by what judging these takes.

    `sampled_rows` is how many rows of each head are held against all keys.
    """
    batch, _, tokens, dim = query.shape
    # float32 scores of the sampled rows; keys and values in another order and as float32; sums by block.
    return _slices_of_heads(query, 4 * batch * tokens * (sampled_rows + 4 * dim))


def blockwise_head_slices(query: Tensor, rows: int, key_block_size: int) -> list[slice]:
    """As `head_slices`, where each of the rows of each head keeps a sum of values for each key block."""
    batch, _, tokens, dim = query.shape
    # float32 scores of the rows; keys and values in another order and as float32; sums by block.
    numbers = tokens * (rows + 4 * dim) + num_blocks(tokens, key_block_size) * rows * dim
    return _slices_of_heads(query, 4 * batch * numbers)


def blockwise_row_slices(query: Tensor, rows: int, key_block_size: int) -> list[slice]:
    """Those rows, of all heads of query, a few at a time, by what their scores and sums take.

    There may be more rows the more tokens there are: of a long video not even one head's all fit.
    """
    batch, heads, tokens, dim = query.shape
    numbers = batch * heads * (tokens + num_blocks(tokens, key_block_size) * dim)
    return slices(rows, 4 * numbers // (TIMES_ON_GPU if query.device.type == "cuda" else 1))


def summed_head_slices(query: Tensor, sampled_rows: int, key_block_size: int) -> list[slice]:
    """As `head_slices` on a GPU whose kernels sum by key block and judge: then the sums are what takes memory."""
    batch, heads, tokens, dim = query.shape
    blocks = num_blocks(tokens, key_block_size)
    # Of 4 bytes: numerators; 16 for denominators, peaks, tail, scores, ranks and ranking; mean keys and values.
    sums = 4 * batch * blocks * (sampled_rows * (dim + 16) + 2 * dim)
    return slices(heads, sums // TIMES_ON_GPU)


def slices(count: int, bytes_each: int) -> list[slice]:
    """`count` things, as many at a time as `PLANNING_BYTES` holds of `bytes_each`, one at least."""
    step = max(1, PLANNING_BYTES // bytes_each)
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _slices_of_heads(query: Tensor, bytes_each: int) -> list[slice]:
    """The heads of query, as many at a time as its kind of device has the memory for."""
    if query.device.type == "cuda":
        bytes_each //= TIMES_ON_GPU
    elif query.device.type == "cpu":
        bytes_each *= PART_ON_CPU
    return slices(query.shape[1], bytes_each)

"""Attention calls of random numbers: what is timed by the benchmarks, and how far off its results are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK_SIZE = 128
SAMPLED_ROWS = 64


def random_inputs(
    tokens: int, heads: int, head_dim: int, device: torch.device, dtype: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value [1, H, S, D], normal, laid out as projections leave them, fresh for each run.

    bf16 on a GPU, fp32 on a CPU, if `dtype` names no other.
    """
    import torch

    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    shape = 1, tokens, heads, head_dim
    query, key, value = (
        torch.randn(shape, device=device, dtype=getattr(torch, dtype)).transpose(1, 2) for _ in range(3)
    )
    return query, key, value


def random_lists(
    tokens: int,
    heads: int,
    density: float,
    device: torch.device,
    blocks: tuple[int, int] = (BLOCK_SIZE, BLOCK_SIZE),
    raggedness: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Key blocks [1, H, Q, C] and counts [1, H, Q], for blocks of so many queries and keys.

    Counts differ from their mean by up to the share `raggedness`: at 0.5 from half to one and a half times the mean.
    The lists ascend, as those of a plan do: query blocks that run at the same time then share what the cache holds.
    """
    import torch

    rows, columns = (-(-tokens // size) for size in blocks)
    spread = min(raggedness, 1 / density - 1)
    factors = 1 + spread * (2 * torch.rand((1, heads, rows), device=device) - 1)
    counts = (density * columns * factors).round().clamp(1, columns).to(torch.int32)
    ranks = torch.rand((1, heads, rows, columns), device=device).argsort(dim=-1)
    is_listed = ranks < counts[..., None]
    # Those that are not listed come last, whichever they are.
    ascending = is_listed.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return ascending[..., : int(counts.max())].to(torch.int32).contiguous(), counts


def sparse_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_blocks: Tensor,
    counts: Tensor,
    blocks: tuple[int, int] = (BLOCK_SIZE, BLOCK_SIZE),
    *,
    tail: bool,
    precision: str = "native",
    backend: str | None = None,
) -> Callable[[], Tensor]:
    """What computes the listed blocks, by the fastest backend if none is named; `tail`: the others enter pooled."""
    import torch

    from diffsparse.kernels.block_sparse import block_sparse_attention
    from diffsparse.kernels.schedule import heavy_first

    # As a plan keeps it.
    schedule = heavy_first(counts.expand(*query.shape[:2], -1))
    in_all_heads = torch.ones((1, 1), dtype=torch.bool, device=query.device) if tail else None

    def call() -> Tensor:
        output = block_sparse_attention(
            query,
            key,
            value,
            key_blocks,
            counts,
            query_block_size=blocks[0],
            key_block_size=blocks[1],
            tail=in_all_heads,
            schedule=schedule,
            backend=backend,
            precision=precision,
            validate=False,
        )
        assert not isinstance(output, tuple)
        return output

    return call


def mean_density(counts: Tensor, tokens: int, key_block_size: int = BLOCK_SIZE) -> float:
    """The share of the blocks of so many keys that counts [1, H, Q] list."""
    return float(counts.float().mean()) / -(-tokens // key_block_size)


def error_of_sampled_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_blocks: Tensor,
    counts: Tensor,
    output: Tensor,
    tail: bool = False,
    key_block_size: int = BLOCK_SIZE,
) -> float:
    """Relative L2 error of some rows of some heads against float64, with or without the means of skipped blocks.

    Query blocks are of BLOCK_SIZE.
    """
    import torch

    if query.device.type != "cuda":
        # Apple's GPUs have no float64.
        query, key, value, key_blocks, counts, output = (
            x.cpu() for x in (query, key, value, key_blocks, counts, output)
        )
    generator = torch.Generator().manual_seed(0)
    squared_error = squared_size = 0.0
    for _ in range(SAMPLED_ROWS):
        row, head = (int(torch.randint(size, (), generator=generator)) for size in (query.shape[2], query.shape[1]))
        block = row // BLOCK_SIZE
        listed = key_blocks[0, head, block, : int(counts[0, head, block])]
        (keys, sizes), (values, _) = (_seen(x[0, head], listed, tail, key_block_size) for x in (key, value))
        logits = keys @ query[0, head, row].double() / math.sqrt(query.shape[3]) + sizes.log()
        expected = logits.softmax(dim=0) @ values
        squared_error += float((output[0, head, row].double() - expected).square().sum())
        squared_size += float(expected.square().sum())
    return math.sqrt(squared_error / squared_size)


def _seen(x: Tensor, listed: Tensor, tail: bool, block_size: int) -> tuple[Tensor, Tensor]:
    """What a query block sees of a head's keys or values x [S, D], which lists blocks [n].

    Rows [m, D], and of how many tokens each is [m], in float64.
    """
    import torch
    from torch.nn import functional as F

    block_of = torch.arange(len(x), device=x.device) // block_size
    sizes = block_of.bincount()
    is_listed = torch.zeros_like(sizes, dtype=torch.bool).index_fill(0, listed.long(), True)
    tokens = x[is_listed[block_of]].double()
    if not tail:
        return tokens, tokens.new_ones(len(tokens))
    sums = F.pad(x.double(), (0, 0, 0, -len(x) % block_size)).unflatten(0, (-1, block_size)).sum(1)
    means = (sums / sizes[:, None])[~is_listed]
    return torch.cat([tokens, means]), torch.cat([tokens.new_ones(len(tokens)), sizes[~is_listed].double()])

"""Block-sparse attention in plain PyTorch: the specification of every other backend, and the CPU path.

One head at a time, a few query blocks at a time, the longest lists first: gather the listed key blocks, then scores,
softmax and weighted sum as batched matrix products. For the pooled tail the means of all blocks are gathered as well.
All is fp32, whatever the inputs are, in memory that is used again and again: fresh memory costs more than filling it.
Query blocks that list every key block need no gather: they go to PyTorch's own attention.

A precision other than "native" is computed with what quantization leaves of the inputs (`quantization.py`), in fp32 as
well: it is as slow, and says what a kernel in that precision has to give.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.kernels.pooling import block_token_counts
from diffsparse.kernels.quantization import (
    PRECISIONS,
    of_key_mean,
    quantized_operands,
    round_weights,
    round_weights_int8,
)

# The most scores held at a time, unless a single query block has more: about what a cache holds.
MAX_SCORES = 1 << 20
# Lists taken together are padded to the longest; the shortest fills at least this share of it.
LEAST_FILLED = 0.85


def why_not(query: Tensor, query_block_size: int, key_block_size: int, precision: str = "native") -> str | None:
    """None: this backend runs wherever PyTorch does. Away from the CPU it is slow and waits for the lists."""
    return None


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
    """The output [B, H, S, D] in query's dtype, and the logsumexp [B, H, S] fp32 (empty if not asked for)."""
    batch, heads, num_queries, head_dim = query.shape
    num_rows = counts.shape[2]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    key_means = value_means = lse_shift = None
    if precision != "native":
        operands = quantized_operands(query, key, value, precision, query_block_size, key_block_size, key_length)
        if return_lse:
            lse_shift = of_key_mean(query, operands.key_mean) * scale
        query, key, value = operands.query, operands.key, operands.value
        key_means, value_means = operands.key_means, operands.value_means
    weights = PRECISIONS[precision].values
    lse = query.new_empty((batch, heads, num_queries) if return_lse else 0, dtype=torch.float32)
    sizes = block_token_counts(key.shape[2], key_block_size, key_length, key.device).expand(batch, -1)  # [B, K]
    key_blocks, counts = key_blocks.expand(batch, heads, -1, -1), counts.expand(batch, heads, -1)
    has_tail = [[False] * heads] * batch if tail is None else tail.expand(batch, heads).tolist()
    memory = _Memory(query.device)
    for b, h in itertools.product(range(batch), range(heads)):
        lists = _Lists.of(key_blocks[b, h], counts[b, h], sizes[b], key_block_size, has_tail[b][h])
        queries = memory.blocks("queries", query[b, h], query_block_size, num_rows)[lists.order]
        keys, values = (
            # What lies beyond the length may hold anything: it is not read.
            lists.with_means(
                memory.blocks(name, x[b, h, : lists.num_keys], key_block_size, lists.num_gathered),
                None if means is None else means[b, h],
            )
            for name, x, means in (("keys", key, key_means), ("values", value, value_means))
        )
        result, result_lse = _attend_head(queries, keys, values, lists, memory, scale, return_lse, weights)
        out[b, h] = result[lists.place].view(-1, head_dim)[:num_queries]
        if return_lse:
            lse[b, h] = result_lse[lists.place].view(-1)[:num_queries]
    return out, lse if lse_shift is None else lse + lse_shift


def _attend_head(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    lists: _Lists,
    memory: _Memory,
    scale: float,
    return_lse: bool,
    weights: str,
) -> tuple[Tensor, Tensor]:
    """Output [Q, q, D] of one head, and if asked for its logsumexp [Q, q].

    queries [Q, q, D], in the order of `lists`; keys and values [K + M, k, D], all blocks, then their means. `weights`
    is what those of listed keys are rounded to: "fp8", after their sum is taken, "int8", before, or "native", not at
    all. Those of means are not rounded.
    """
    block_size, head_dim = queries.shape[1:]
    out, lse = memory.take("out", queries.shape), memory.take("lse", queries.shape[:2])
    num_dense = lists.num_complete if queries.device.type == "cpu" and weights == "native" else 0
    if num_dense:
        # What F.scaled_dot_product_attention runs on the CPU, called by name because it returns the logsumexp too.
        result, result_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries[:num_dense].view(1, 1, -1, head_dim),
            *(x.view(1, 1, -1, head_dim)[:, :, : lists.num_keys] for x in (keys, values)),
            scale=scale,
        )
        out[:num_dense] = result.view(num_dense, block_size, head_dim)
        lse[:num_dense] = result_lse.view(num_dense, block_size)
    nothing_added = queries.new_zeros(1, 1, 1)
    for rows, blocks, columns, bias in lists.chunks(num_dense, MAX_SCORES // block_size):
        scores = memory.take("scores", (len(blocks), block_size, columns))
        gathered = memory.gather(keys, blocks)[:, :columns]
        # With beta 0 the first argument is not read, but on Apple's GPUs up to PyTorch 2.13, which multiply it by 0.
        added, beta = (nothing_added, 0.0) if bias is None else (bias[:, None], 1.0)
        torch.baddbmm(added, queries[rows], gathered.mT, beta=beta, alpha=scale, out=scores)
        if return_lse:
            lse[rows] = scores.logsumexp(-1)
        torch.softmax(scores, dim=-1, out=scores)
        listed = scores[..., : columns - lists.num_means]
        if weights == "fp8":
            listed.copy_(round_weights(listed, scores.amax(-1, keepdim=True)))
        elif weights == "int8":
            listed.copy_(round_weights_int8(listed, lists.key_block_size))
            scores.div_(scores.sum(-1, keepdim=True))
        torch.bmm(scores, memory.gather(values, blocks)[:, :columns], out=out[rows])
    # The softmax of nothing is not a number.
    nothing = lists.sees_nothing[:, None]
    return out.masked_fill_(nothing[..., None], 0.0), lse.masked_fill_(nothing, -torch.inf)


@dataclass(frozen=True, eq=False)
class _Lists:
    """The key blocks that each query block of one head sees, the longest list first.

    Attributes:
        order: [Q], the query block of each list; `place` [Q] is the inverse.
        blocks: [Q, C] int64; beyond the count any valid number.
        sizes: [Q, C] int64, how many tokens of each listed block exist, 0 beyond the count.
        counts: Q numbers.
        block_sizes: [K] int64, how many tokens of each block exist.
        num_keys: their sum.
        key_block_size: tokens a block.
        tail_bias: [Q, K] fp32, the log of the size of each block that is not listed, -inf for the others; None
            without a tail.
    """

    order: Tensor
    place: Tensor
    blocks: Tensor
    sizes: Tensor
    counts: list[int]
    block_sizes: Tensor
    num_keys: int
    key_block_size: int
    tail_bias: Tensor | None

    @classmethod
    def of(cls, key_blocks: Tensor, counts: Tensor, block_sizes: Tensor, key_block_size: int, tail: bool) -> _Lists:
        order = counts.argsort(descending=True, stable=True)
        counts = counts[order]
        is_listed = torch.arange(key_blocks.shape[1], device=counts.device) < counts[:, None]
        # What is beyond the count becomes one block more, without a token.
        num_blocks = len(block_sizes)
        blocks = key_blocks[order].long().where(is_listed, num_blocks)
        sizes = torch.cat([block_sizes, block_sizes.new_zeros(1)])
        tail_bias = sizes.float().repeat(len(order), 1).scatter_(1, blocks, 0.0).log_() if tail else None
        return cls(
            order,
            order.argsort(),
            blocks.where(is_listed, 0),
            sizes[blocks],
            counts.tolist(),
            block_sizes,
            int(block_sizes.sum()),
            key_block_size,
            None if tail_bias is None else tail_bias[:, :num_blocks],
        )

    @property
    def num_complete(self) -> int:
        """How many query blocks see all keys; theirs are the first lists."""
        return self.counts.count(len(self.block_sizes)) if self.num_keys else 0

    @property
    def num_means(self) -> int:
        """How many means enter the softmax: K with a tail, else none."""
        return 0 if self.tail_bias is None else len(self.block_sizes)

    @property
    def num_gathered(self) -> int:
        """K + M, the blocks to gather from: those of the keys and, with a tail, those that hold their means."""
        num_blocks = len(self.block_sizes)
        return num_blocks + (0 if self.tail_bias is None else -(-num_blocks // self.key_block_size))

    @property
    def sees_nothing(self) -> Tensor:
        """[Q] bool, whether no token that exists is seen."""
        has_tail = self.tail_bias is not None and self.num_keys > 0
        return torch.zeros_like(self.order, dtype=torch.bool) if has_tail else self.sizes.sum(1) == 0

    def with_means(self, blocks: Tensor, means: Tensor | None = None) -> Tensor:
        """Write the means [K, D], of the first K blocks if None, into the last M of the blocks [K + M, k, D]; those."""
        num_blocks = len(self.block_sizes)
        if self.tail_bias is not None:
            if means is None:
                means = blocks[:num_blocks].sum(1).div_(self.block_sizes.clamp(min=1)[:, None])
            blocks[num_blocks:].view(-1, blocks.shape[2])[:num_blocks] = means
        return blocks

    def chunks(self, first: int, max_columns: int) -> Iterator[tuple[slice, Tensor, int, Tensor | None]]:
        """From the list `first` on: a few lists, their blocks [n, c], how many of the tokens to use, their bias.

        The bias [n, columns] hides what does not exist and weighs the means; None where there is nothing of both.
        """
        means = torch.arange(len(self.block_sizes), self.num_gathered, device=self.order.device)
        while first < len(self.counts):
            count = self.counts[first]
            columns = count * self.key_block_size + self.num_means
            end = min(first + max(1, max_columns // columns), len(self.counts))
            while self.counts[end - 1] < LEAST_FILLED * count:
                end -= 1
            rows = slice(first, end)
            blocks, sizes = self.blocks[rows, :count], self.sizes[rows, :count]
            bias = None
            if self.tail_bias is not None or not bool((sizes == self.key_block_size).all()):
                exists = torch.arange(self.key_block_size, device=sizes.device) < sizes[..., None]
                parts = [torch.where(exists, 0.0, -torch.inf).float().flatten(1)]
                bias = torch.cat(parts if self.tail_bias is None else [*parts, self.tail_bias[rows]], dim=1)
                bias = bias.masked_fill(self.sees_nothing[rows, None], 0.0)
            yield rows, torch.cat([blocks, means.expand(len(blocks), -1)], dim=1), columns, bias
            first = rows.stop


class _Memory:
    """fp32 memory by name, used again for whatever comes next under that name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory of this shape; it holds anything."""
        size = math.prod(shape)
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = torch.empty(size, dtype=torch.float32, device=self.device)
        return self.held[name][:size].view(shape)

    def blocks(self, name: str, x: Tensor, block_size: int, count: int) -> Tensor:
        """The rows of x [S, D] as blocks [count, block_size, D] in fp32, zeros after the end; x itself if it fits."""
        if x.dtype == torch.float32 and x.is_contiguous() and len(x) == count * block_size:
            return x.view(count, block_size, -1)
        rows = self.take(name, (count * block_size, x.shape[1]))
        rows[: len(x)] = x
        rows[len(x) :] = 0.0
        return rows.view(count, block_size, -1)

    def gather(self, source: Tensor, blocks: Tensor) -> Tensor:
        """The blocks [n, c] of source [K, k, D], one after the other: [n, c * k, D], until the next call."""
        gathered = self.take("gathered", (blocks.numel(), *source.shape[1:]))
        torch.index_select(source, 0, blocks.flatten(), out=gathered)
        return gathered.view(len(blocks), -1, source.shape[2])

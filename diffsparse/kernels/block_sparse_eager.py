"""Block-sparse attention in plain PyTorch: the specification of every other backend, and the CPU path.

For one query block: gather the listed key blocks, attend to them; a tile of keys at a time, so that memory stays
bounded, and tiles are merged by their logsumexp. Products and sums are fp32 whatever the inputs are. On the CPU each
thread takes whole query blocks, so no thread waits for another and ragged counts cost no more than equal ones.
Query blocks that list every key block need no gather: all of them in one call of PyTorch's own attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from itertools import groupby, product

import torch
from torch import Tensor
from torch.nn import functional as F

from diffsparse.kernels.pooling import block_means

# The most keys gathered at a time; measured: fewer cost more merging, more leave the cache.
TILE_TOKENS = 4096
# With fewer scores than this in all, starting threads costs more than it gains.
MIN_SCORES_FOR_THREADS = 1 << 20


def why_not(query: Tensor, query_block_size: int, key_block_size: int) -> str | None:
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
) -> tuple[Tensor, Tensor]:
    """The output [B, H, S, D] in query's dtype, and the logsumexp [B, H, S] fp32 (empty if not asked for)."""
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    out = query.new_empty((batch, heads, num_queries, head_dim))
    lse = query.new_empty((batch, heads, num_queries) if return_lse else (0,), dtype=torch.float32)
    lengths = [num_keys] * batch if key_length is None else key_length.clamp(0, num_keys).tolist()
    lists = key_blocks.expand(batch, heads, -1, -1)
    counts_of = counts.expand(batch, heads, -1).tolist()
    has_tail = [[False] * heads] * batch if tail is None else tail.expand(batch, heads).tolist()
    pooled_keys = pooled_values = sizes = query.new_empty((batch, heads, 0))
    if any(map(any, has_tail)):
        pooled_keys, sizes = block_means(key, key_block_size, key_length)
        pooled_values, _ = block_means(value, key_block_size, key_length)
        sizes = sizes.expand(batch, -1)
    keys, values = _split_blocks(key, key_block_size), _split_blocks(value, key_block_size)

    blocks: list[tuple[_Head, int, int]] = []
    for b, h in product(range(batch), range(heads)):
        head = _Head(
            query=query[b, h],
            keys=keys[b, h],
            values=values[b, h],
            lists=lists[b, h],
            tail=_Tail.prepare(pooled_keys[b, h], pooled_values[b, h], sizes[b], lists[b, h], counts_of[b][h])
            if has_tail[b][h]
            else None,
            out=out[b, h],
            lse=lse[b, h] if return_lse else None,
            num_keys=lengths[b],
            query_block_size=query_block_size,
            key_block_size=key_block_size,
            scale=scale,
        )
        sees_everything = [count == len(head.keys) and head.num_keys > 0 for count in counts_of[b][h]]
        for is_dense, run in groupby(range(len(sees_everything)), sees_everything.__getitem__):
            indices = list(run)
            if is_dense:
                head.attend_everything(indices[0], indices[-1] + 1)
            else:
                blocks += [(head, i, counts_of[b][h][i]) for i in indices]
    _attend_in_threads(blocks, query)
    return out, lse


@dataclass(frozen=True, eq=False)
class _Head:
    """One head of one batch entry: what its query blocks read and where they write."""

    query: Tensor  # [S, D]
    keys: Tensor  # [K, key_block_size * D]
    values: Tensor  # [K, key_block_size * D]
    lists: Tensor  # [Q, C]
    tail: _Tail | None
    out: Tensor  # [S, D]
    lse: Tensor | None  # [S]
    num_keys: int  # that exist
    query_block_size: int
    key_block_size: int
    scale: float

    def attend_everything(self, first: int, end: int) -> None:
        """Query blocks first to end see every key: no gather, all of them in one call."""
        rows = slice(first * self.query_block_size, end * self.query_block_size)
        head_dim = self.query.shape[1]
        keys, values = (x.view(-1, head_dim)[: self.num_keys] for x in (self.keys, self.values))
        self._write(rows, *_attention(self.query[rows].contiguous(), keys, values, self.scale))

    def attend_block(self, i: int, count: int, scratch: _Scratch) -> None:
        """Query block i sees the first `count` blocks of its list, and the rest pooled if there is a tail."""
        rows = slice(i * self.query_block_size, (i + 1) * self.query_block_size)
        query = self.query[rows].float().contiguous()  # [q, D]
        listed = self.lists[i, :count]
        seen = [_attention(query, keys, values, self.scale) for keys, values in self._listed_tiles(listed, scratch)]
        if self.tail is not None and self.tail.is_seen[i]:
            seen.append(_attention(query, self.tail.keys, self.tail.values, self.scale, self.tail.bias[i]))
        if not seen:
            seen.append((query.new_zeros(()), query.new_tensor(-torch.inf)))
        self._write(rows, *reduce(_merge, seen))

    def _write(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        self.out[rows] = out
        if self.lse is not None:
            self.lse[rows] = lse

    def _listed_tiles(self, listed: Tensor, scratch: _Scratch) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values [n, D] of the listed blocks; of a block that ends early, only what exists."""
        num_missing = 0
        if self.num_keys < len(self.keys) * self.key_block_size:
            num_whole, num_rest = divmod(self.num_keys, self.key_block_size)
            # The block that ends early comes last, so that what is missing can be cut off.
            ends_early = listed[listed == num_whole] if num_rest else listed[:0]
            num_missing = len(ends_early) * (self.key_block_size - num_rest)
            listed = torch.cat([listed[listed < num_whole], ends_early])
        for first, end in _even_ranges(len(listed), scratch.num_blocks):
            keys, values = scratch.gather(self.keys, self.values, listed[first:end])
            num_tokens = len(keys) - (num_missing if end == len(listed) else 0)
            yield keys[:num_tokens], values[:num_tokens]


@dataclass(frozen=True, eq=False)
class _Tail:
    """The pooled blocks of one head, and which of them each query block sees: those it does not list."""

    keys: Tensor  # [K, D] fp32
    values: Tensor  # [K, D] fp32
    bias: Tensor  # [Q, K] fp32: log of the block's size, -inf where the block is listed or has no key
    is_seen: list[bool]  # for each query block, whether anything is left to see

    @classmethod
    def prepare(cls, keys: Tensor, values: Tensor, sizes: Tensor, lists: Tensor, counts: list[int]) -> _Tail:
        """The tail for blocks of the given sizes [K] and lists [Q, C]."""
        num_rows, num_blocks = len(lists), len(sizes)
        # What lies beyond a list's count goes to a column of its own, which is cut off.
        listed = torch.arange(lists.shape[1], device=lists.device) < torch.tensor(counts, device=lists.device)[:, None]
        bias = keys.new_zeros((num_rows, num_blocks + 1))
        bias.scatter_(1, lists.where(listed, num_blocks).long(), -torch.inf)
        bias = bias[:, :-1] + sizes.log()
        return cls(keys, values, bias, (bias > -torch.inf).any(dim=1).tolist())


class _Scratch:
    """One thread's memory for the keys and values of one tile."""

    def __init__(self, head: _Head) -> None:
        self.num_blocks = max(1, TILE_TOKENS // head.key_block_size)
        self.head_dim = head.query.shape[1]
        tile = head.keys.new_empty((2, self.num_blocks, head.keys.shape[1]))
        self.gathered = tile.unbind()
        self.in_fp32 = self.gathered if tile.dtype == torch.float32 else torch.empty_like(tile, dtype=torch.float32)

    def gather(self, keys: Tensor, values: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The given blocks [n] of keys and values as rows [n * key_block_size, D] fp32."""
        rows = []
        for source, gathered, in_fp32 in zip((keys, values), self.gathered, self.in_fp32):
            torch.index_select(source, 0, blocks, out=gathered[: len(blocks)])
            if in_fp32 is not gathered:
                in_fp32[: len(blocks)].copy_(gathered[: len(blocks)])
            rows.append(in_fp32[: len(blocks)].view(-1, self.head_dim))
        return rows[0], rows[1]


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output [q, D] and logsumexp [q] of query [q, D] on keys and values [n, D], bias [n] added to the logits."""
    if query.device.type != "cpu":
        logits = query.float() @ keys.float().T * scale + (0 if bias is None else bias)
        return logits.softmax(dim=1) @ values.float(), logits.logsumexp(dim=1)
    # What F.scaled_dot_product_attention runs on the CPU, called by name because it returns the logsumexp too.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None, None],
        keys[None, None],
        values[None, None],
        attn_mask=None if bias is None else bias.expand(1, 1, len(query), -1),
        scale=scale,
    )
    return out[0, 0], lse[0, 0]


def _merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Output [q, D] and logsumexp [q] of one softmax over two sets of keys, from those of each."""
    share = torch.sigmoid(other[1] - one[1])
    return torch.lerp(one[0], other[0], share[:, None]), torch.logaddexp(one[1], other[1])


def _attend_in_threads(blocks: list[tuple[_Head, int, int]], query: Tensor) -> None:
    """Attend the given query blocks (head, index, count), each thread taking the next one when it is free."""
    if not blocks:
        return
    head = blocks[0][0]
    num_scores = sum(count for _, _, count in blocks) * head.query_block_size * head.key_block_size
    num_threads = torch.get_num_threads()
    remaining = iter(blocks)

    def work(scratch: _Scratch) -> None:
        for head, i, count in remaining:
            head.attend_block(i, count, scratch)

    if num_threads == 1 or num_scores < MIN_SCORES_FOR_THREADS or query.device.type != "cpu":
        work(_Scratch(head))
        return

    def work_in_thread(scratch: _Scratch) -> None:
        # Grad mode, inference mode and the number of threads of an operator belong to a thread.
        torch.set_num_threads(1)
        with torch.inference_mode(head.out.is_inference()), torch.no_grad():
            work(scratch)

    try:
        with ThreadPoolExecutor(num_threads) as threads:
            list(threads.map(work_in_thread, [_Scratch(head) for _ in range(num_threads)]))
    finally:
        # set_num_threads above also left 1 behind as what later threads start with.
        torch.set_num_threads(num_threads)


def _even_ranges(num: int, largest: int) -> list[tuple[int, int]]:
    """First and end of equal ranges that cover num things, none longer than `largest`."""
    if num == 0:
        return []
    size = -(-num // -(-num // largest))
    return [(first, min(first + size, num)) for first in range(0, num, size)]


def _split_blocks(x: Tensor, block_size: int) -> Tensor:
    """x [B, H, S, D] as blocks [B, H, K, block_size * D], zeros after the end; a view where x allows it."""
    batch, heads, num_tokens, head_dim = x.shape
    num_missing = -num_tokens % block_size
    x = F.pad(x, (0, 0, 0, num_missing)) if num_missing else x.contiguous()
    return x.view(batch, heads, -1, block_size * head_dim)

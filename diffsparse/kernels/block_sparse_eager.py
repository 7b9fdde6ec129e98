"""Block-sparse attention in plain PyTorch: the specification of every other backend, and the CPU path.

Query blocks with equally long lists are taken together: gather their key blocks, attend to them in one batched call.
Tiles of keys bound the memory and are merged by their logsumexp; so is the pooled tail. Gathered keys and values are
fp32 whatever the inputs are. Query blocks that list every key block need no gather: they go to PyTorch's own attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from diffsparse.kernels.pooling import block_means, block_token_counts

# The most keys gathered at a time, over all query blocks taken together.
TILE_TOKENS = 9216


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
    if key_length is not None:
        # What lies beyond may hold anything, and NaN would survive a bias of -inf.
        beyond = (torch.arange(num_keys, device=key.device) >= key_length[:, None])[:, None, :, None]
        key, value = key.masked_fill(beyond, 0.0), value.masked_fill(beyond, 0.0)
    queries, keys, values = (
        _split_blocks(x, size)
        for x, size in ((query, query_block_size), (key, key_block_size), (value, key_block_size))
    )
    out = torch.zeros_like(queries)  # [B, H, Q, query_block * D]
    lse = query.new_full((batch, heads, queries.shape[2], query_block_size), -torch.inf, dtype=torch.float32)
    sizes = block_token_counts(num_keys, key_block_size, key_length, query.device).expand(batch, -1)  # [B, K]

    sees_all = (counts.expand(batch, heads, -1) == keys.shape[2]) & (sizes.sum(-1) > 0)[:, None, None]
    lengths = sizes.sum(-1).tolist()
    for b, h in (sees_all.any(-1)).nonzero().tolist():
        for first, end in _runs(sees_all[b, h].tolist()):
            query_rows = queries[b, h, first:end].view(-1, head_dim)
            exist = (x[b, h].view(-1, head_dim)[: lengths[b]] for x in (keys, values))
            result, row_lse = _attention(query_rows[None], next(exist)[None], next(exist)[None], scale)
            out[b, h, first:end] = result.view(end - first, -1)
            lse[b, h, first:end] = row_lse.view(end - first, -1)

    rows = _Rows.of(key_blocks, counts, sizes, tail, heads, key_block_size)
    pooled = None
    if tail is not None:
        pooled_keys, _ = block_means(key, key_block_size, key_length)
        pooled_values, _ = block_means(value, key_block_size, key_length)
        pooled = pooled_keys.flatten(0, 1), pooled_values.flatten(0, 1)
    gather = _Gather(keys, values, key_block_size)
    for group in rows.groups((~sees_all).flatten(), key_block_size):
        result, row_lse = group.attend(queries.flatten(0, 2), gather, pooled, scale)
        out.view(-1, query_block_size * head_dim)[group.index] = result.flatten(1).to(out.dtype)
        lse.view(-1, query_block_size)[group.index] = row_lse

    out = out.view(batch, heads, -1, head_dim)[:, :, :num_queries].contiguous()
    return out, lse.flatten(2)[:, :, :num_queries].contiguous() if return_lse else lse.new_empty(0)


class _Gather:
    """Fetches key blocks into memory of its own, used again and again: fresh memory costs more than the copy."""

    def __init__(self, keys: Tensor, values: Tensor, key_block_size: int) -> None:
        self.sources = keys.flatten(0, 2), values.flatten(0, 2)  # [B * H * K, k * D]
        self.head_dim = keys.shape[-1] // key_block_size
        self.max_blocks = max(1, TILE_TOKENS // key_block_size)
        shape = 2, self.max_blocks, keys.shape[-1]
        self.gathered = keys.new_empty(shape)
        self.in_fp32 = self.gathered if keys.dtype == torch.float32 else keys.new_empty(shape, dtype=torch.float32)

    def __call__(self, blocks: Tensor) -> Iterator[Tensor]:
        """Keys, then values of the blocks [n, count], each [n, count * k, D] fp32, until the next call."""
        for source, gathered, in_fp32 in zip(self.sources, self.gathered, self.in_fp32):
            torch.index_select(source, 0, blocks.flatten(), out=gathered[: blocks.numel()])
            if in_fp32.dtype != gathered.dtype:
                in_fp32[: blocks.numel()].copy_(gathered[: blocks.numel()])
            yield in_fp32[: blocks.numel()].view(len(blocks), -1, self.head_dim)


@dataclass(frozen=True, eq=False)
class _Rows:
    """All query blocks of all heads, one after the other.

    Attributes:
        lists: [R, C] int64, key blocks numbered over all heads; what lies beyond a count is any valid number.
        counts: [R] int64.
        sizes: [B * H * K], how many tokens of each key block exist.
        tail: [R] bool, whether unlisted blocks enter pooled.
    """

    lists: Tensor
    counts: Tensor
    sizes: Tensor
    tail: Tensor
    num_blocks: int

    @classmethod
    def of(
        cls, key_blocks: Tensor, counts: Tensor, sizes: Tensor, tail: Tensor | None, heads: int, key_block_size: int
    ) -> _Rows:
        batch, num_blocks = sizes.shape
        num_rows = counts.shape[2]
        lists = key_blocks.long().expand(batch, heads, -1, -1)
        counts = counts.long().expand(batch, heads, -1)
        listed = torch.arange(lists.shape[-1], device=lists.device) < counts[..., None]
        head = torch.arange(batch * heads, device=lists.device).view(batch, heads, 1, 1)
        lists = lists.where(listed, 0) + head * num_blocks
        has_tail = counts.new_zeros((batch, heads)) if tail is None else tail.expand(batch, heads)
        return cls(
            lists.flatten(0, 2),
            counts.flatten(),
            sizes[:, None].expand(-1, heads, -1).flatten(),
            has_tail.bool()[..., None].expand(-1, -1, num_rows).flatten(),
            num_blocks,
        )

    def groups(self, wanted: Tensor, key_block_size: int) -> Iterator[_Group]:
        """The wanted rows [R] in groups of equal count that need the same things, each a tile of keys at most."""
        listed = torch.arange(self.lists.shape[1], device=self.lists.device) < self.counts[:, None]
        num_seen = (self.sizes[self.lists] * listed).sum(-1)
        is_whole = num_seen == self.counts * key_block_size
        kind = torch.stack([self.counts, is_whole.long(), self.tail.long()], dim=1)
        index = wanted.nonzero()[:, 0]
        if len(index) == 0:
            return
        kinds, kind_of_row = kind[index].unique(dim=0, return_inverse=True)
        in_order = index[kind_of_row.argsort(stable=True)]
        for (count, whole, tail), rows in zip(kinds.tolist(), in_order.split(kind_of_row.bincount().tolist())):
            step = max(1, TILE_TOKENS // (count * key_block_size))
            for part in rows.split(step):
                yield _Group(part, self.lists[part, :count], self, bool(whole), bool(tail), key_block_size)


@dataclass(frozen=True, eq=False)
class _Group:
    """Query blocks with equally long lists."""

    index: Tensor  # [n]
    lists: Tensor  # [n, count]
    rows: _Rows
    is_whole: bool  # every token of every listed block exists
    tail: bool
    key_block_size: int

    def attend(
        self, queries: Tensor, gather: _Gather, pooled: tuple[Tensor, Tensor] | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output [n, q, D] fp32 and logsumexp [n, q] of these query blocks.

        queries [R, q * D]; pooled keys and values [B * H, K, D].
        """
        query = queries[self.index].float().view(len(self.index), -1, gather.head_dim)
        seen = []
        for tile in self.lists.split(gather.max_blocks, dim=1):
            bias = None if self.is_whole else self._hide_missing(tile)
            keys, values = gather(tile)
            seen.append(_attention(query, keys, values, scale, bias))
        if self.tail and pooled is not None:
            head = self.lists[:, 0] // self.rows.num_blocks
            seen.append(_attention(query, pooled[0][head], pooled[1][head], scale, self._tail_bias(head)))
        out, lse = seen[0]
        for other in seen[1:]:
            out, lse = _merge(out, lse, *other)
        return out, lse

    def _hide_missing(self, tile: Tensor) -> Tensor:
        """0 for the tokens of the listed blocks that exist, -inf for the others: [n, count * k]."""
        exists = torch.arange(self.key_block_size, device=tile.device) < self.rows.sizes[tile][..., None]
        return torch.where(exists, 0.0, -torch.inf).flatten(1)

    def _tail_bias(self, head: Tensor) -> Tensor:
        """The log of each block's size, -inf where it is listed or has no token: [n, K]."""
        sizes = self.rows.sizes.view(-1, self.rows.num_blocks)[head].float()
        return sizes.scatter(1, self.lists % self.rows.num_blocks, 0.0).log()


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output [n, q, D] and logsumexp [n, q] of query [n, q, D] on keys and values [n, k, D].

    `bias` [n, k] is added to the logits. Where it leaves nothing to see, the output is 0 and the logsumexp -inf.
    """
    sees_nothing = None if bias is None else (bias == -torch.inf).all(1)
    if bias is not None and sees_nothing is not None:
        bias = bias.masked_fill(sees_nothing[:, None], 0.0)
    if query.device.type == "cpu":
        # What F.scaled_dot_product_attention runs on the CPU, called by name because it returns the logsumexp too.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[:, None],
            keys[:, None],
            values[:, None],
            attn_mask=None if bias is None else bias[:, None, None].expand(-1, 1, query.shape[1], -1),
            scale=scale,
        )
        out, lse = out[:, 0], lse[:, 0]
    else:
        logits = query.float() @ keys.float().mT * scale + (0 if bias is None else bias[:, None])
        out, lse = logits.softmax(-1) @ values.float(), logits.logsumexp(-1)
    if sees_nothing is not None:
        out = out.masked_fill(sees_nothing[:, None, None], 0.0)
        lse = lse.masked_fill(sees_nothing[:, None], -torch.inf)
    return out, lse


def _merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Output [n, q, D] and logsumexp [n, q] of one softmax over two sets of keys, from those of each."""
    both = torch.logaddexp(lse, other_lse)
    share = torch.exp(other_lse - both).nan_to_num(0.0)  # where neither sees anything
    return torch.lerp(out, other_out, share[..., None]), both


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """First and end of each run of true flags."""
    runs = [[i for i, _ in run] for flag, run in groupby(enumerate(flags), lambda pair: pair[1]) if flag]
    return [(run[0], run[-1] + 1) for run in runs]


def _split_blocks(x: Tensor, block_size: int) -> Tensor:
    """x [B, H, S, D] as blocks [B, H, K, block_size * D], zeros after the end; a view where x allows it."""
    batch, heads, num_tokens, head_dim = x.shape
    num_missing = -num_tokens % block_size
    x = F.pad(x, (0, 0, 0, num_missing)) if num_missing else x.contiguous()
    return x.view(batch, heads, -1, block_size * head_dim)

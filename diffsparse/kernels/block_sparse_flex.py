"""Block-sparse attention by PyTorch's flex_attention, to compare with, or where our own kernels are not wanted.

Never taken unless named. The lists become a BlockMask as they are: whole blocks without a mask, a ragged or cut off
block with one. For the pooled tail the means of all blocks follow the keys as blocks of their own, which every query
block lists; the mask hides the means of blocks that it lists itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from diffsparse.kernels.pooling import block_means, block_token_counts, tail_logs

BLOCK_SIZES = (16, 32, 64, 128)
# A graph each: head dim, block sizes, dtype, tail or none, one number of tokens or any. PyTorch stops at 8.
MOST_GRAPHS = 64

Modifier = Callable[..., Tensor]


def why_not(query: Tensor, query_block_size: int, key_block_size: int) -> str | None:
    """Why this backend cannot take such a query [B, H, S, D]; None if it can."""
    if query.device.type == "cpu":
        return "on a CPU flex_attention has no logsumexp where it is compiled, and holds S x S scores where it is not"
    if query.device.type != "cuda":
        return f"it needs a CUDA GPU, not {query.device.type}"
    for name, size in (("query", query_block_size), ("key", key_block_size)):
        if size not in BLOCK_SIZES:
            return f"a {name} block of {size} tokens is none of {', '.join(map(str, BLOCK_SIZES))}"
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
    batch, heads = query.shape[:2]
    num_keys = key.shape[2]
    # flex_attention looks at this even where no gradients are recorded.
    query, key, value = query.detach(), key.detach(), value.detach()
    key_blocks, counts = key_blocks.expand(batch, heads, -1, -1), counts.expand(batch, heads, -1)
    lengths = torch.full((batch,), num_keys, device=key.device) if key_length is None else key_length.long()
    if key_length is not None:
        # A weight of 0 does not help against what is not a number.
        beyond = torch.arange(num_keys, device=key.device) >= key_length[:, None]
        value = value.masked_fill(beyond[:, None, :, None], 0.0)

    sizes = block_token_counts(num_keys, key_block_size, key_length, key.device).expand(batch, -1)  # [B, K]
    is_listed = torch.arange(key_blocks.shape[3], device=counts.device) < counts[..., None]  # [B, H, Q, C]
    blocks = key_blocks.where(is_listed, 0).long()
    tokens = sizes[:, None, None].expand(*counts.shape, -1).gather(-1, blocks).where(is_listed, 0)
    is_whole, is_masked = tokens == key_block_size, (tokens > 0) & (tokens < key_block_size)

    num_blocks = sizes.shape[1]
    first_mean = num_blocks * key_block_size
    mask, score = _exists(lengths), None
    if tail is not None:
        num_mean_blocks = num_blocks // key_block_size + 1
        num_means = num_mean_blocks * key_block_size  # with zeros up to whole blocks
        logs = tail_logs(key_blocks, counts, num_keys, key_block_size, key_length, num_means)  # [B, H, Q, means]
        mask = _exists_or_means(lengths, logs, first_mean, query_block_size)
        score = _weigh_means(logs, first_mean, query_block_size)
        means = [block_means(x, key_block_size, key_length)[0].to(x.dtype) for x in (key, value)]
        key, value = (
            torch.cat([_padded(x, first_mean), _padded(mean, num_means)], dim=2) for x, mean in zip((key, value), means)
        )
        mean_blocks = torch.arange(num_blocks, num_blocks + num_mean_blocks, device=key.device)
        has_tail = tail.expand(batch, heads)[..., None, None]
        blocks = torch.cat([blocks, mean_blocks.expand(*counts.shape, -1)], dim=-1)
        is_masked = torch.cat([is_masked, has_tail.expand(*counts.shape, num_mean_blocks)], dim=-1)
        is_whole = F.pad(is_whole, (0, num_mean_blocks))
    # As long as each other: PyTorch's kernel takes the steps of one for both.
    (masked, num_masked), (whole, num_whole) = (_chosen_first(blocks, chosen) for chosen in (is_masked, is_whole))
    block_mask = BlockMask.from_kv_blocks(
        num_masked,
        masked,
        num_whole,
        whole,
        BLOCK_SIZE=(query_block_size, key_block_size),
        mask_mod=mask,
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,
    )
    out, lse = _run(query, key, value, block_mask, score, scale, return_lse)
    return out.contiguous(), query.new_empty(0, dtype=torch.float32) if lse is None else lse


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    score: Modifier | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    config: Any = torch._dynamo.config
    with config.patch(recompile_limit=MOST_GRAPHS):
        out, lse = _compiled(query, key, value, block_mask, score, scale, return_lse)
    return out, lse


# Where it cannot be compiled whole it raises, and does not go on uncompiled.
@functools.partial(torch.compile, fullgraph=True)
def _compiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    score: Modifier | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "The backend 'flex' needs torch.compile, which is switched off here: uncompiled, flex_attention does not "
            "read the lists of blocks. Switch it on, or take another backend."
        )
    out, extra = flex_attention(
        query,
        key,
        value,
        score_mod=score,
        block_mask=block_mask,
        scale=scale,
        return_aux=AuxRequest(lse=return_lse),
        kernel_options=_tiles(*block_mask.BLOCK_SIZE),
    )
    return out, extra.lse


def _tiles(query_block_size: int, key_block_size: int) -> Any:
    """Tiles that fit into the blocks where those of PyTorch's choice, up to 128 tokens, might not."""
    sizes = {"BLOCK_M": query_block_size, "BLOCK_N": key_block_size}
    return {name: size for name, size in sizes.items() if size < 128} or None


def _exists(lengths: Tensor) -> Modifier:
    """Hides keys at or beyond the lengths [B]."""

    def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < lengths[b]

    return mask


def _exists_or_means(lengths: Tensor, logs: Tensor, first_mean: int, query_block_size: int) -> Modifier:
    """The same for keys before `first_mean`. Means follow: what stands for no token, by `logs`, is hidden."""

    def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        mean = (key - first_mean).clamp(min=0)
        return torch.where(key < first_mean, key < lengths[b], logs[b, h, query // query_block_size, mean] >= 0)

    return mask


def _weigh_means(logs: Tensor, first_mean: int, query_block_size: int) -> Modifier:
    """Adds the logarithm of how many tokens a mean stands for. `logs` [B, H, Q, means] are to base 2."""

    def score(logit: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        mean = (key - first_mean).clamp(min=0)
        log = logs[b, h, query // query_block_size, mean] * math.log(2)
        return torch.where(key < first_mean, logit, logit + log)

    return score


def _chosen_first(blocks: Tensor, is_chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Lists [B, H, Q, C] int32 with the chosen blocks in front, and how many that are, [B, H, Q] int32."""
    order = is_chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return blocks.gather(-1, order).to(torch.int32), is_chosen.sum(dim=-1, dtype=torch.int32)


def _padded(x: Tensor, num_tokens: int) -> Tensor:
    """x [B, H, S, D] with zeros up to `num_tokens`."""
    return F.pad(x, (0, 0, 0, num_tokens - x.shape[2]))

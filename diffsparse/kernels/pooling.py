"""Block means of keys and values: what a skipped block is replaced by in the pooled tail."""

from __future__ import annotations

import torch
from torch import Tensor


def block_means(x: Tensor, block_size: int, key_length: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean of every block of x [B, H, S, D] as [B, H, K, D] fp32, and how many tokens it is over, [B|1, K] int64.

    The last block may be ragged. Tokens at or beyond `key_length` [B] are left out, whatever they hold; a block
    without any token left has mean 0 and count 0. Nothing is synchronised with the host.
    """
    batch, heads, num_tokens, head_dim = x.shape
    token_counts = block_token_counts(num_tokens, block_size, key_length, x.device)
    if key_length is not None:
        beyond = torch.arange(num_tokens, device=x.device) >= key_length.to(x.device)[:, None]
        x = x.masked_fill(beyond[:, None, :, None], 0)
    num_whole = num_tokens // block_size
    sums = x.new_empty((batch, heads, token_counts.shape[1], head_dim), dtype=torch.float32)
    whole = x[:, :, : num_whole * block_size].unflatten(2, (num_whole, block_size))
    sums[:, :, :num_whole] = whole.sum(dim=3, dtype=torch.float32)
    if num_whole < sums.shape[2]:
        sums[:, :, num_whole] = x[:, :, num_whole * block_size :].sum(dim=2, dtype=torch.float32)
    return sums / token_counts.clamp(min=1)[:, None, :, None], token_counts


def block_token_counts(
    num_tokens: int, block_size: int, key_length: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """How many tokens of each block exist, [B|1, K] int64: fewer in a ragged last block and beyond `key_length` [B]."""
    device = device if key_length is None else key_length.device
    starts = torch.arange(0, num_tokens, block_size, device=device)
    if key_length is None:
        return (num_tokens - starts).clamp(max=block_size)[None]
    return (key_length.long().clamp(max=num_tokens)[:, None] - starts).clamp(min=0, max=block_size)

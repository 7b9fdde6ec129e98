"""Sol-Attn (arXiv:2607.24027): blocks above a threshold of each row exactly, all others by their mean."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.kernels.pooling import block_means
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_layout import block_layout
from diffsparse.strategies.option_checks import check_block_sizes, check_bools, check_number
from diffsparse.strategies.strategy import AttentionCall

EPSILON = 1e-6
"""Added to the variance of the scores in base 2, as released."""
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class SolAttention:
    """Each query block sees the key blocks whose pooled score lies `tau` deviations above the mean, and its neighbours.

    Scores are between the mean query of a block and the mean keys, less their mean over all blocks. Their deviation is
    estimated as in the released operator, as if a key's dimensions varied independently of each other: the root of the
    sum of squared query times variance of the mean keys. What is not seen enters as the mean of its block; blocks that
    share a token with the query block, and one before and behind these, are seen in any case.

    Of normal scores, `tau` 1 would keep 16 %, 1.5 7 % and 2 2 %, and the neighbours. The rule is that of comfy-kitchen
    0.2.40 (`sol_attn`, its reference), which is behind ComfyUI's own node; that has a default of 1.3 and blocks of 64
    tokens in frame-major order. There all queries of a block give what is not seen the weights of their mean, here
    each its own. Tokens that the node takes one by one beyond the blocks, and its INT8, are left out.

    Args:
        tau: the threshold in deviations, 0–4.
        tail: whether what is not seen enters as the mean of its block.
        query_block_size, key_block_size: tokens a block.

    Raises:
        ValueError: an option out of its range.
    """

    tau: float = 1.3
    tail: bool = True
    query_block_size: int = 64
    key_block_size: int = 64

    def __post_init__(self) -> None:
        check_number("tau", self.tau, 0, 4)
        check_bools(tail=self.tail)
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        blocks = self.query_block_size, self.key_block_size
        layout = block_layout(call.grid, *blocks, query.device)
        scale = call.scale_of(query)
        mean_query, _ = block_means(layout.ordered(query), self.query_block_size)
        mean_key, tokens = block_means(layout.ordered(key), self.key_block_size, call.key_length)
        exists = (tokens > 0)[:, None, :, None]  # [B|1, 1, K, 1]
        num_blocks = exists.sum(2, keepdim=True)
        centred = (mean_key - mean_key.sum(2, keepdim=True) / num_blocks).masked_fill(~exists, 0.0)
        variance = centred.square().sum(2, keepdim=True) / num_blocks  # [B, H, 1, D]
        scores = mean_query @ centred.transpose(-1, -2) * scale  # [B, H, Q, K]
        squared_deviation = (mean_query.square() * variance).sum(-1, keepdim=True) * scale**2
        threshold = self.tau * (squared_deviation + EPSILON / LOG2_E**2).sqrt()
        near = _neighbours(scores.shape[2], scores.shape[3], *blocks, query.device)
        seen = (scores > threshold) & exists.transpose(-1, -2) | layout.always | near
        tail = torch.ones(1, 1, dtype=torch.bool, device=query.device) if self.tail else None
        return dataclasses.replace(layout.plan(seen), tail=tail)


def _neighbours(rows: int, columns: int, query_block_size: int, key_block_size: int, device: torch.device) -> Tensor:
    """Key blocks that share a token with a query block, and one to either side of them: [Q, K] bool."""
    begin = torch.arange(rows, device=device)[:, None] * query_block_size
    column = torch.arange(columns, device=device)
    first, last = begin // key_block_size - 1, (begin + query_block_size - 1) // key_block_size + 1
    return (column >= first) & (column <= last)

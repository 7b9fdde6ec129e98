"""AdaSpa (arXiv:2502.21079): the blocks that hold most exact attention, more of them in heads that miss much."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_attention import block_attention
from diffsparse.strategies.block_layout import block_layout
from diffsparse.strategies.option_checks import check_block_sizes, check_density, check_shares
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.top_blocks import top_blocks


@dataclass(frozen=True)
class AdaSpa:
    """Each query block sees the key blocks that hold most of its attention, computed exactly.

    The recall of a head is the share of attention that `density` of the key blocks hold, mean over its query blocks.
    Heads above `recall` get by with half as many blocks, as many heads with the lowest recall get half as many again.
    Where more than half of the heads are above it, that half of them counts whose recall is highest.

    Scores are exact, so a plan costs as much as dense attention and more. The method plans after its dense steps, a
    fifth of all, and once again when three fifths are done: `SparseAttentionConfig(AdaSpa(), replan_every=20)` for 50
    steps. The rule is that of the paper; no code of it was found. A batch shares the recall of its heads.

    Args:
        density: share of the key blocks that a query block sees, 0–1, mean over the heads.
        recall: share of attention, 0–1, above which a head needs less.
        query_block_size, key_block_size: tokens a block.

    Raises:
        ValueError: an option out of its range.
    """

    density: float = 0.2
    recall: float = 0.8
    query_block_size: int = 64
    key_block_size: int = 64

    def __post_init__(self) -> None:
        check_density(self.density)
        check_shares(recall=self.recall)
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        sizes = self.query_block_size, self.key_block_size
        layout = block_layout(call.grid, *sizes, query.device)
        queries, keys = layout.ordered(query) * call.scale_of(query), layout.ordered(key)
        shares = block_attention(queries, keys, *sizes, call.key_length)
        fewer, count, more = (round(part * self.density * shares.shape[-1]) for part in (0.5, 1.0, 1.5))
        held = shares.where(top_blocks(shares, count, layout.always), 0.0).sum(-1).mean((0, 2))  # [H]
        heads = len(held)
        num_changed = (held > self.recall).sum().clamp(max=heads // 2)
        rank = held.argsort(descending=True, stable=True).argsort()
        counts = torch.where(rank < num_changed, fewer, torch.where(rank >= heads - num_changed, more, count))
        return layout.plan(top_blocks(shares, counts[:, None, None], layout.always))

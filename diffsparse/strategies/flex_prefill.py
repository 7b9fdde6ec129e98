"""FlexPrefill (arXiv:2502.20766): pooled scores where they tell the truth, columns and diagonals where they do not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.kernels.pooling import block_means
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_layout import block_layout
from diffsparse.strategies.fixed_masks import sampled_rows
from diffsparse.strategies.option_checks import check_block_sizes, check_sampling, check_shares
from diffsparse.strategies.planning_memory import head_slices
from diffsparse.strategies.pooled_scores import pooled_scores
from diffsparse.strategies.smallest_set import smallest_set
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.vertical_slash import block_mass, column_mass, columns_and_diagonals, diagonal_mass


@dataclass(frozen=True)
class FlexPrefill:
    """Each head that pooling describes well keeps the highest pooled entries, any other one columns and diagonals.

    For a few sampled queries the exact attention to each key block is compared with the softmax of their mean against
    the mean keys. Where the square root of the Jensen-Shannon divergence of the two is below `threshold`, the head
    keeps the fewest entries of its whole pooled map that hold `mass` of it; otherwise the fewest columns, and the
    fewest diagonals, that each hold `mass` of the sampled attention. The first key block is always seen.

    Other than published: the sampled queries are spread over the video, where the causal method takes the last 128;
    columns and diagonals are of blocks, where the method counts the keys it needs and divides by the size of a block;
    the least and the greatest budget are left out; 0 log 0 is 0, where the released code gets NaN and falls to
    columns and diagonals.

    Args:
        mass: what is kept must hold this share, 0–1; 0.9 and 0.95 are published.
        threshold: 0 for columns and diagonals everywhere, 1 for pooled scores everywhere.
        sampled_rows: queries a head that are computed exactly.
        block_size: tokens a block, of queries and of keys.
        seed: of the sampled rows.

    Raises:
        ValueError: an option out of its range.
    """

    mass: float = 0.9
    threshold: float = 0.1
    sampled_rows: int = 128
    block_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        check_shares(mass=self.mass, threshold=self.threshold)
        check_sampling(self.sampled_rows, self.seed)
        check_block_sizes(block_size=self.block_size)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        layout = block_layout(call.grid, self.block_size, self.block_size, query.device)
        places = sampled_rows(call.grid, self.sampled_rows, self.seed, query.device) - call.grid.text_before
        query, key = layout.ordered(query), layout.ordered(key)
        always = layout.always | (torch.arange(len(layout.always), device=query.device) == 0)
        chosen = [
            self._choose(query[:, heads], key[:, heads], places, always, call)
            for heads in head_slices(query, self.sampled_rows)
        ]
        return layout.plan(torch.cat(chosen, dim=1))

    def _choose(self, query: Tensor, key: Tensor, places: Tensor, always: Tensor, call: AttentionCall) -> Tensor:
        """The block map [B, H, K, K] of some heads [B, H, S, D]."""
        rows = query.index_select(2, places).float() * call.scale_of(query)
        mass = block_mass(rows, key, self.block_size, call.key_length)  # [B, H, R, K]
        columns, diagonals = column_mass(mass), diagonal_mass(mass, places // self.block_size)
        mean_key, tokens = block_means(key, self.block_size, call.key_length)
        # A block weighs as much as it has keys, which is the same for all but a ragged one.
        estimate = ((mean_key @ rows.mean(2)[..., None])[..., 0] + tokens.log()[:, None]).softmax(-1)  # [B, H, K]
        is_pooled = jensen_shannon(estimate, columns).sqrt() < self.threshold  # [B, H]

        sizes = self.block_size, self.block_size
        scores = pooled_scores(query, key, *sizes, key_length=call.key_length, scale=call.scale)
        pooled = smallest_set(scores.softmax(-1).flatten(-2), self.mass, always.flatten()).view(scores.shape)
        structured = columns_and_diagonals(smallest_set(columns, self.mass), smallest_set(diagonals, self.mass))
        return torch.where(is_pooled[..., None, None], pooled, structured | always)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of distributions p and q [..., N], in nats: [...], from 0 to log 2."""
    middle = (p + q) / 2
    # Where both are 0 there is nothing to compare.
    middle = middle.masked_fill(middle == 0, 1.0)
    divergence = torch.xlogy(p, p / middle).sum(-1) + torch.xlogy(q, q / middle).sum(-1)
    # Rounding may leave it below 0.
    return divergence.clamp(min=0) / 2

"""MInference (arXiv:2407.02490): one of three patterns for each head, its places found while the model runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.heads import BlockSums, head_errors
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_layout import block_layout
from diffsparse.strategies.fixed_masks import sampled_rows
from diffsparse.strategies.option_checks import check_block_sizes, check_density, check_sampling, check_shares
from diffsparse.strategies.planning_memory import head_slices
from diffsparse.strategies.pooled_scores import pooled_scores
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.top_blocks import top_blocks
from diffsparse.strategies.vertical_slash import column_mass, columns_and_diagonals, diagonal_mass


@dataclass(frozen=True)
class MInference:
    """Each head takes the A-shape, the vertical-slash or the block-sparse pattern, whichever costs it least.

    The A-shape is the first key block and the nearest ones. Vertical-slash is the columns and the diagonals with the
    most attention of sampled queries, in several proportions. Block-sparse is the highest scores between mean query
    and mean key. All have the same budget of key blocks; a diagonal that leaves the map or meets a column makes a row
    see less than that.

    Other than published: the pattern of a head is not searched offline, on a text, by output error or by recall, but at
    each plan, by the output error of the executed mask on the sampled queries. These are spread over the video, where
    the causal method takes the last 64. Columns and diagonals are of blocks, so a budget is a density, not a number of
    keys. Queries see both ways.

    Args:
        density: share of the key blocks that a query block sees, 0–1.
        column_shares: how much of the budget columns may have beside diagonals, each a candidate; those of the
            released candidates go from 0.04 (30 columns, 800 diagonals) to 0.97 (3500 and 100).
        sampled_rows: queries a head that are computed exactly.
        block_size: tokens a block, of queries and of keys.
        seed: of the sampled rows.

    Raises:
        ValueError: an option out of its range.
    """

    density: float = 0.25
    column_shares: tuple[float, ...] = (0.1, 0.5, 0.9)
    sampled_rows: int = 64
    block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        if not isinstance(self.column_shares, tuple):
            raise ValueError(
                f"`column_shares` must be a tuple of numbers from 0 to 1, got {self.column_shares!r}. "
                f"For one candidate say (0.5,), for none ()."
            )
        for share in self.column_shares:
            check_shares(column_shares=share)
        check_sampling(self.sampled_rows, self.seed)
        check_block_sizes(block_size=self.block_size)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        layout = block_layout(call.grid, self.block_size, self.block_size, query.device)
        places = sampled_rows(call.grid, self.sampled_rows, self.seed, query.device) - call.grid.text_before
        query, key, value = (layout.ordered(x) for x in (query, key, value))
        chosen = [
            self._choose(query[:, heads], key[:, heads], value[:, heads], places, layout.always, call)
            for heads in head_slices(query, self.sampled_rows)
        ]
        return layout.plan(torch.cat(chosen, dim=1))

    def _choose(
        self, query: Tensor, key: Tensor, value: Tensor, places: Tensor, always: Tensor, call: AttentionCall
    ) -> Tensor:
        """The block map [B, H, K, K] of the best pattern of each head of query, key, value [B, H, S, D]."""
        rows = query.index_select(2, places).float() * call.scale_of(query)
        row_blocks = places // self.block_size
        sums = BlockSums.of(rows, key, value, self.block_size, key_length=call.key_length)
        mass = sums.mass()  # [B, H, R, K]
        sizes = self.block_size, self.block_size
        scores = pooled_scores(query, key, *sizes, key_length=call.key_length, scale=call.scale)
        exact, candidates = sums.exact(), self._candidates(scores, mass, row_blocks, always)
        outputs = (sums.masked(each.index_select(2, row_blocks))[0] for each in candidates)
        best = torch.stack([head_errors(output, exact) for output in outputs]).argmin(0)  # [H]
        return torch.stack(candidates, 2)[:, torch.arange(len(best), device=best.device), best]

    def _candidates(self, scores: Tensor, mass: Tensor, row_blocks: Tensor, always: Tensor) -> list[Tensor]:
        """Block maps [B, H, K, K] of scores [B, H, K, K] and of the sampled rows' attention [B, H, R, K]."""
        blocks = scores.shape[-1]
        budget = max(1, round(self.density * blocks))
        place = torch.arange(blocks, device=scores.device)
        distance = (place[:, None] - place).abs().float()
        is_first = place == 0
        is_main = torch.arange(2 * blocks - 1, device=scores.device) == blocks - 1
        columns, diagonals = column_mass(mass), diagonal_mass(mass, row_blocks)
        patterns = [top_blocks(-distance, budget, always | is_first).expand(scores.shape)]
        for share in self.column_shares:
            width = round(share * budget)
            kept_columns = top_blocks(columns, width, is_first)
            kept_diagonals = top_blocks(diagonals, budget - width, is_main)
            patterns.append(columns_and_diagonals(kept_columns, kept_diagonals) | always)
        return [*patterns, top_blocks(scores, budget, always)]

"""SampleAttention (arXiv:2406.15486): a window, and the columns that sampled queries look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_layout import block_layout
from diffsparse.strategies.fixed_masks import sampled_rows
from diffsparse.strategies.option_checks import check_block_sizes, check_sampling, check_shares
from diffsparse.strategies.planning_memory import head_slices
from diffsparse.strategies.smallest_set import smallest_set
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.vertical_slash import block_mass, column_mass


@dataclass(frozen=True)
class SampleAttention:
    """Every query block of a head sees the blocks around it and the same few columns of key blocks.

    Two stages: the exact attention of a few queries, spread over the video; then the fewest columns that hold `mass`
    of what these queries look at beyond their window. Columns are of blocks, so that a key brings its block with it
    and the density is that of the blocks chosen. Made for the causal prefill of language models; here the window
    reaches to both sides. The paper's abstract names neither of the numbers; the defaults are our choice.

    Args:
        window: share of the sequence that a query block sees around itself, 0–1.
        mass: share of the attention beyond the window that the columns must hold, 0–1.
        sampled_rows: queries a head that are computed exactly.
        block_size: tokens a block, of queries and of keys.
        seed: of the sampled rows.

    Raises:
        ValueError: an option out of its range.
    """

    window: float = 0.1
    mass: float = 0.6
    sampled_rows: int = 64
    block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_shares(window=self.window, mass=self.mass)
        check_sampling(self.sampled_rows, self.seed)
        check_block_sizes(block_size=self.block_size)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        layout = block_layout(call.grid, self.block_size, self.block_size, query.device)
        places = sampled_rows(call.grid, self.sampled_rows, self.seed, query.device) - call.grid.text_before
        query, key = layout.ordered(query), layout.ordered(key)
        blocks = len(layout.always)
        place = torch.arange(blocks, device=query.device)
        # As many blocks to the left as to the right.
        window = (place[:, None] - place).abs() * 2 <= self.window * blocks
        exact = window | layout.always
        beyond = ~exact.index_select(0, places // self.block_size)  # [R, K]
        columns = []
        for heads in head_slices(query, self.sampled_rows):
            rows = query[:, heads].index_select(2, places) * call.scale_of(query)
            mass = column_mass(block_mass(rows, key[:, heads], self.block_size, call.key_length) * beyond)
            columns.append(smallest_set(mass, self.mass))
        return layout.plan(torch.cat(columns, dim=1)[..., None, :] | exact)

"""SparseD (arXiv:2509.24014): the blocks with the highest exact attention, found once and kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffsparse.kernels.pooling import block_token_counts
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_attention import block_attention
from diffsparse.strategies.block_layout import block_layout
from diffsparse.strategies.option_checks import check_block_sizes, check_density
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.top_blocks import top_blocks


@dataclass(frozen=True)
class SparseD:
    """Each query block sees the key blocks whose mean attention, computed exactly, is the highest.

    Scores are exact, so a plan costs as much as dense attention and more. The method makes one, after its dense steps,
    and keeps it to the end; so does this, whatever `replan_every` says. Published with a fifth of the steps dense.

    Made for language models, where the prompt and what is generated choose among their own keys; here text is exact.
    Own blocks and text count within the share.

    Args:
        density: share of the key blocks that a query block sees, 0–1; one block more, as in the released code. That
            uses 0.3 in blocks of 128 for long sequences, 0.5 in blocks of 32 for short ones.
        query_block_size, key_block_size: tokens a block.

    Raises:
        ValueError: an option out of its range.
    """

    density: float = 0.3
    query_block_size: int = 128
    key_block_size: int = 128

    def __post_init__(self) -> None:
        check_density(self.density)
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        sizes = self.query_block_size, self.key_block_size
        layout = block_layout(call.grid, *sizes, query.device)
        queries, keys = layout.ordered(query) * call.scale_of(query), layout.ordered(key)
        shares = block_attention(queries, keys, *sizes, call.key_length)
        tokens = block_token_counts(call.grid.num_tokens, self.key_block_size, call.key_length, query.device)
        count = int(self.density * shares.shape[-1]) + 1
        return layout.plan(top_blocks(shares / tokens.clamp(min=1)[:, None, None], count, layout.always), lasts=True)

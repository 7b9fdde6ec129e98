"""The tokens of one attention call: where they sit, and in which order they come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.grid import TokenGrid, grid_of
from diffsparse.rank_order import RankOrder
from diffsparse.text_order import TextOrder


@dataclass(frozen=True)
class CallTokens:
    """The keys of a call; its queries are as many, or those of the grid, with the text behind it or without.

    Attributes:
        laid_out: where the keys sit, as the model lays them out.
        text_moves: whether text has to go behind the grid for a plan: to hide what is padded within it, or since it has
            no queries.
    """

    laid_out: TokenGrid
    text_moves: bool

    @classmethod
    def of(cls, layout: tuple[int | None, ...], num_queries: int, num_keys: int, padded_within: bool) -> CallTokens:
        """By the layout of the transformer's call; `padded_within` is whether a mask hides text before its end."""
        laid_out = grid_of(layout, num_keys)
        return cls(laid_out, padded_within or (num_queries < num_keys and laid_out.text_before > 0))

    @property
    def allowed_without_queries(self) -> tuple[int, ...]:
        """How many tokens may be without: none, those before the grid, or all but the grid."""
        return 0, self.laid_out.text_before, self.laid_out.text_before + self.laid_out.text_after

    @property
    def grid(self) -> TokenGrid:
        """Where the tokens sit for a plan: once the order in which they come is undone."""
        return self.laid_out.with_text_last() if self.text_moves else self.laid_out

    def order(self, mask: Tensor | None, ranks: int, text_apart: bool | None, device: torch.device) -> Order:
        """The order in which keys come, and queries where they are as many.

        Args:
            mask: [B|1, (1, 1,) S] bool, the keys that are not hidden; None where all are.
            ranks: how many ranks the sequence was put together from.
            text_apart: as a family says it.
        """
        # Without a mask, text behind the grid is where it has to be, as in decoder layers of Motif-Video.
        if self.text_moves and (mask is not None or self.laid_out.text_before):
            return TextOrder.of(mask, self.laid_out, device)
        first = self.laid_out.text_before or self.laid_out.num_video_tokens
        rest = self.laid_out.num_tokens - first
        return RankOrder((first, rest) if text_apart and rest else (first + rest,), ranks)


Order = RankOrder | TextOrder

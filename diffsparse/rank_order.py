"""The order in which Ulysses context parallelism hands a sequence to attention, and the tokens' own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RankOrder:
    """The order of a sequence that was put together from what each rank had.

    A model's tensors, text and video say, are each cut into one piece for each rank, as `torch.tensor_split` cuts, and
    a rank's tokens are its pieces one after the other. So the whole sequence comes as
    `[text of rank 0 | video of rank 0 | text of rank 1 | …]`.

    Attributes:
        lengths: tokens of each of the model's tensors, in the order of the sequence.
        ranks: how many ranks there are.
    """

    lengths: tuple[int, ...]
    ranks: int

    def undo(self, x: Tensor) -> Tensor:
        """The tokens of x [B, H, S, D], which come in this order, in their own."""
        if self._is_own:
            return x
        pieces = x.split([size for sizes in zip(*self._sizes()) for size in sizes], dim=2)
        parts = len(self.lengths)
        return torch.cat([piece for part in range(parts) for piece in pieces[part::parts]], dim=2)

    def apply(self, x: Tensor) -> Tensor:
        """The tokens of x [B, H, S, D], which come in their own order, in this one."""
        if self._is_own:
            return x
        pieces = x.split([size for sizes in self._sizes() for size in sizes], dim=2)
        return torch.cat([piece for rank in range(self.ranks) for piece in pieces[rank :: self.ranks]], dim=2)

    @property
    def _is_own(self) -> bool:
        """Whether this is the tokens' own order: then nothing needs a copy."""
        return self.ranks == 1 or len(self.lengths) == 1

    def _sizes(self) -> list[list[int]]:
        """Tokens that each rank has of each tensor, [tensor][rank]."""
        return [[n // self.ranks + (rank < n % self.ranks) for rank in range(self.ranks)] for n in self.lengths]

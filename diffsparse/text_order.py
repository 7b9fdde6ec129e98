"""The order of a sequence whose text does not stand where a plan needs it: behind the grid, padding last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.grid import TokenGrid


@dataclass(frozen=True, eq=False)
class TextOrder:
    """The order of a sequence with text before the grid, or with text that a mask hides before its end.

    Its own order, in which a key length can stand for a mask, is `[grid | text | what the mask hides]`.

    Attributes:
        places: [B|1, S] int64, the token of the sequence at each place of its own order.
    """

    places: Tensor

    @classmethod
    def of(cls, mask: Tensor | None, grid: TokenGrid, device: torch.device) -> TextOrder:
        """The order of a sequence laid out as `grid`, whose text a mask [B|1, (1, 1,) S] bool leaves or hides."""
        behind = torch.ones(1, grid.num_tokens, dtype=torch.int8, device=device)
        behind[:, grid.text_before : grid.text_before + grid.num_video_tokens] = 0
        if mask is not None:
            behind = behind + ~mask.reshape(mask.shape[0], -1)
        return cls(behind.argsort(dim=1, stable=True))

    def undo(self, x: Tensor) -> Tensor:
        """The tokens of x [B, H, S, D], which come in this order, in their own."""
        return _in_order(x, self.places)

    def apply(self, x: Tensor) -> Tensor:
        """The tokens of x [B, H, S, D], which come in their own order, in this one."""
        return _in_order(x, self.places.argsort(dim=1))


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of x [B, H, S, D] in the order [B|1, S] of each row of the batch, one after the other in memory."""
    tokens = x.transpose(1, 2)  # [B, S, H, D]
    batch, num_tokens = tokens.shape[:2]
    places = order + num_tokens * torch.arange(batch, device=x.device)[:, None]
    return tokens.flatten(0, 1).index_select(0, places.flatten()).view(tokens.shape).transpose(1, 2)

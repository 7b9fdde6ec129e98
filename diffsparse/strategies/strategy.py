"""What every strategy is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.plan import AttentionPlan


@runtime_checkable
class Strategy(Protocol):
    """Makes plans from a layer's queries, keys and values. Implemented by frozen dataclasses."""

    def plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: TokenGrid,
        *,
        key_length: Tensor | None = None,
        scale: float | None = None,
    ) -> AttentionPlan | None:
        """What this layer computes until it is planned again; None where it should stay dense.

        Args:
            query, key, value: [B, H, S, D], with S = grid.num_tokens, after norms and rotary embedding.
            grid: where the tokens sit.
            key_length: [B] int32, keys at or beyond it do not exist; None when all do.
            scale: factor on the scores, D ** -0.5 if None.
        """
        ...

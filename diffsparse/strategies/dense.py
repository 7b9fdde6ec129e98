"""Every layer dense: for tests and for comparison."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffsparse.strategies.strategy import AttentionCall


@dataclass(frozen=True)
class Dense:
    """Leaves every layer to the model's own attention."""

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> None:
        """No plan: the layer stays dense."""
        return

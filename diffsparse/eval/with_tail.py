"""The pooled tail for strategies that know none: what a plan skips enters as the mean of each block, in every head."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsparse.plan import AttentionPlan
from diffsparse.strategies.strategy import AttentionCall, Strategy


@dataclass(frozen=True)
class WithTail:
    """The plans of another strategy, with the tail in all heads of those that have none."""

    strategy: Strategy

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan | None:
        """The plan of a layer; see `Strategy.plan`."""
        plan = self.strategy.plan(query, key, value, call)
        if plan is None or plan.tail is not None:
            return plan
        return dataclasses.replace(plan, tail=torch.ones(1, 1, dtype=torch.bool, device=query.device))


def with_tail(strategy: Any, tail: bool) -> Strategy:
    """The strategy with or without the pooled tail: by its own option where it has one, else by `WithTail`."""
    if hasattr(strategy, "tail"):
        own: Strategy = dataclasses.replace(strategy, tail=tail)
        return own
    return WithTail(strategy) if tail else strategy

"""What planning and permuting cost beside the dense attention that they replace."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffsparse.grid import TokenGrid

if TYPE_CHECKING:
    import torch

FRAMES = 16
"""The measured grid: as many frames, as near to square as the tokens allow."""


@dataclass(frozen=True)
class Overhead:
    """Seconds of one call each, medians, in one run.

    Attributes:
        plan_seconds: making the plan of a layer, which then serves `replan_every` steps.
        permute_seconds: key and value into the order of the plan, and where the backend does not do it beside its own
            work, query too and the output back; at each call.
        replan_every: steps for which a plan is kept by default.
    """

    dense_seconds: float
    plan_seconds: float
    permute_seconds: float
    replan_every: int

    @property
    def share_of_dense(self) -> float:
        """Planning, spread over the steps that it serves, and permuting, as a share of the dense call."""
        return (self.plan_seconds / self.replan_every + self.permute_seconds) / self.dense_seconds


def bench_planning(
    grid: TokenGrid, heads: int, head_dim: int, dtype: str, density: float, repeats: int, device: torch.device
) -> Overhead:
    """Plan and permute random inputs laid out as projections leave them, in turn with dense attention."""
    from torch.nn import functional as F

    from diffsparse.config import SparseAttentionConfig
    from diffsparse.eval.random_attention import random_inputs
    from diffsparse.eval.timing import seconds_in_rounds
    from diffsparse.kernels.backends import takes_orders
    from diffsparse.kernels.block_sparse import backend_taken
    from diffsparse.strategies.adaptive import Adaptive
    from diffsparse.strategies.strategy import AttentionCall

    query, key, value = random_inputs(grid.num_tokens, heads, head_dim, device, dtype)
    strategy = Adaptive(density=density)
    call = AttentionCall(grid)
    plan = strategy.plan(query, key, value, call)

    blocks = plan.mask.query_block_size, plan.mask.key_block_size
    with_kernel = takes_orders(backend_taken(query.device, query.dtype, head_dim, *blocks))

    def permute() -> None:
        assert plan.permutation is not None
        for x in (key, value):
            plan.permutation.apply(x)
        if not with_kernel:
            plan.permutation.undo(plan.permutation.apply(query))

    calls = {
        "dense": lambda: F.scaled_dot_product_attention(query, key, value),
        "plan": lambda: strategy.plan(query, key, value, call),
        "permute": permute,
    }
    seconds = {name: statistics.median(each) for name, each in seconds_in_rounds(calls, repeats, device).items()}
    return Overhead(
        dense_seconds=seconds["dense"],
        plan_seconds=seconds["plan"],
        permute_seconds=seconds["permute"],
        replan_every=SparseAttentionConfig().replan_every,
    )


def grid_of(tokens: int) -> TokenGrid:
    """The grid of about so many tokens."""
    frames = min(FRAMES, tokens)
    height = max(1, round((tokens / frames) ** 0.5))
    return TokenGrid(frames, height, max(1, round(tokens / frames / height)))

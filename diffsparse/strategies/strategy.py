"""What every strategy is, and what it is told."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.plan import AttentionPlan


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Where and when an attention call happens.

    Attributes:
        grid: where the tokens sit.
        layer: index of the self-attention layer, 0 first; `num_layers`, how many the transformer has.
        step: index of the denoising step, 0 first; `num_steps`, how many there are, None when nothing says so.
        progress: how far the sparse steps have come in the middle of those that the plan is to serve, 0–1; None when
            nothing says so.
        key_length: [B] int32, keys at or beyond it do not exist: padded text behind the video; None when all do.
        scale: factor on the scores, D ** -0.5 if None.
        model: the transformer's class; empty where nothing says so.
    """

    grid: TokenGrid
    layer: int = 0
    num_layers: int = 1
    step: int = 0
    num_steps: int | None = None
    progress: float | None = None
    key_length: Tensor | None = None
    scale: float | None = None
    model: str = ""

    def scale_of(self, query: Tensor) -> float:
        """The factor on the scores of query [B, H, S, D], whether or not one is given."""
        return query.shape[-1] ** -0.5 if self.scale is None else self.scale


@runtime_checkable
class Strategy(Protocol):
    """Makes plans from a layer's queries, keys and values. Implemented by frozen dataclasses."""

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan | None:
        """What this layer computes until it is planned again; None where it should stay dense.

        Args:
            query, key, value: [B, H, S, D], with S = call.grid.num_tokens, after norms and rotary embedding.
            call: where and when.
        """
        ...


def make_plan(
    strategy: Strategy, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall
) -> AttentionPlan | None:
    """`strategy.plan`, whatever the default device is.

    What strategies make without a device is on the CPU and kept for later calls. Where that is the default device
    anyway, nothing stands in for it: such a context costs time at each call of PyTorch.
    """
    is_cpu = torch.get_default_device().type == "cpu"
    with contextlib.nullcontext() if is_cpu else torch.device("cpu"):
        return strategy.plan(query, key, value, call)

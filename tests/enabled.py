"""Configs small enough for tiny models, a call, and what ran: for every test that enables sparse attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import diffsparse
from diffsparse import Adaptive, SparseAttentionConfig
from diffsparse.report import TransformerReport
from diffsparse.strategies.dense import Dense


def config(strategy: Any = None, **changes: Any) -> SparseAttentionConfig:
    """Sparse at any length and from the first step, in blocks small enough for tiny models."""
    strategy = strategy or Adaptive(density=0.3, query_block_size=16, key_block_size=16)
    return SparseAttentionConfig(**({"strategy": strategy, "dense_steps": 0.0, "min_tokens": 0} | changes))


DENSE = config(Dense())
FULL = config(Adaptive(density=1.0, query_block_size=16, key_block_size=16))
SPARSE = config()


def run(model: nn.Module, call: dict[str, Any]) -> Tensor:
    """What the model makes of a call."""
    with torch.no_grad():
        return forward(model, call)


def forward(model: nn.Module, call: dict[str, Any]) -> Tensor:
    """The same with gradients."""
    output = model(**call, return_dict=False)[0]
    return torch.stack(output) if isinstance(output, list) else output


def report_of(model: Any) -> TransformerReport:
    """The report of the one transformer that is enabled."""
    (report,) = diffsparse.sparse_attention_report(model).transformers
    return report

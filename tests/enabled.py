"""Configs small enough for tiny models, calls, and what ran: for every test that enables sparse attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny_models import TINY
from torch import Tensor, nn

import diffsparse
from diffsparse import Adaptive, SparseAttentionConfig
from diffsparse.pipelines.families import find_family
from diffsparse.report import TransformerReport
from diffsparse.strategies.dense import Dense
from diffsparse.strategies.strategy import AttentionCall


def config(strategy: Any = None, **changes: Any) -> SparseAttentionConfig:
    """Sparse at any length and from the first step, in blocks small enough for tiny models."""
    strategy = strategy or Adaptive(density=0.3, query_block_size=16, key_block_size=16)
    return SparseAttentionConfig(**({"strategy": strategy, "dense_steps": 0.0, "min_tokens": 0} | changes))


@dataclass(frozen=True)
class Watched(Adaptive):
    """The default strategy in small blocks, which remembers the calls that it plans."""

    query_block_size: int = 16
    key_block_size: int = 16
    calls: list[AttentionCall] = field(default_factory=list, compare=False)

    def plan(self, query, key, value, call):
        self.calls.append(call)
        return super().plan(query, key, value, call)

    @property
    def planned(self) -> list[tuple[int, int]]:
        """Layer and step of each call."""
        return [(call.layer, call.step) for call in self.calls]


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


def steps(model, call, count=3):
    """The call at falling timesteps, as a denoising loop makes them."""
    name = find_family(model).timestep
    return [call | {name: call[name] * (count - step) / count} for step in range(count)]


def run_steps(model, call, count=3):
    return torch.stack([run(model, each) for each in steps(model, call, count)])


def num_calls(tiny):
    """Attention calls of a call of the transformer with two rows."""
    return len(tiny.layers) * tiny.calls_per_layer


def surroundings(model):
    """Everything on a model that enabling could touch: attributes, processors, hooks."""
    return {
        name: (
            type(module),
            sorted(key for key in vars(module)),
            type(getattr(module, "processor", None)),
            dict(vars(getattr(module, "processor", object))),
            [len(hooks) for key, hooks in sorted(vars(module).items()) if key.endswith(("_hooks", "_kwargs"))],
        )
        for name, module in model.named_modules()
    }


# What does not depend on how a model lays out its tokens is tried on one model for each way to attention.
each_way_to_attention = pytest.mark.parametrize("tiny", [name for name in TINY if TINY[name].compiled], indirect=True)


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

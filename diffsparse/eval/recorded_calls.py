"""Attention calls kept from one dense video, on which plans can be tried without making a video for each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.config import SparseAttentionConfig
from diffsparse.eval.generate import Sampling, generate, sparse_attention
from diffsparse.heads import sample_rows
from diffsparse.plan import AttentionPlan
from diffsparse.steps import progress
from diffsparse.strategies.strategy import AttentionCall, Strategy

REPLAN_EVERY = SparseAttentionConfig().replan_every
SAMPLED_ROWS = 64


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """What a strategy would be given, query, key, value [B, H, S, D], and what is exact for its sampled rows.

    Attributes:
        age: steps since the layer was to be planned; 0 where it is.
        rows: the sampled tokens, [R].
        exact: dense attention of these, [B, H, R, D] float32.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    call: AttentionCall
    age: int
    rows: Tensor
    exact: Tensor


@dataclass(eq=False)
class _Recorder:
    """Keeps each layer's call where it is planned and where its plan serves for the last time; plans nothing."""

    calls: list[RecordedCall] = field(default_factory=list)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> None:
        first_step = self.calls[0].call.step if self.calls else call.step
        age = (call.step - first_step) % REPLAN_EVERY
        if age in (0, REPLAN_EVERY - 1):
            rows = sample_rows(call.grid, SAMPLED_ROWS).to(query.device)
            exact = _exact(query.index_select(2, rows), key, value, call)
            if call.num_steps is not None:
                # Of a plan that serves `REPLAN_EVERY` steps, and not of the one that the recorder is asked for.
                call = replace(call, progress=progress(call.step, REPLAN_EVERY, first_step, call.num_steps))
            self.calls.append(RecordedCall(query.clone(), key.clone(), value.clone(), call, age, rows, exact))


def record_calls(pipe: Any, prompt: str, seed: int, sampling: Sampling, dense_steps: float) -> list[RecordedCall]:
    """The calls of a dense video that would be sparse, of the first guidance branch, from which plans are made.

    Raises:
        ValueError: there is none.
    """
    recorder = _Recorder()
    config = SparseAttentionConfig(recorder, dense_steps=dense_steps, min_tokens=0, replan_every=1)
    with sparse_attention(pipe, config):
        generate(pipe, prompt, seed, sampling)
    if not recorder.calls:
        raise ValueError(
            f"No attention call of the model can be sparse with {dense_steps:g} of "
            f"{sampling.num_inference_steps} steps dense. Name fewer --dense-steps, or another model."
        )
    return recorder.calls


def density_of(strategy: Strategy, calls: list[RecordedCall]) -> float:
    """Share of key blocks computed exactly, mean over the calls; a layer left dense counts as 1."""
    densities = [
        torch.ones((), device=call.query.device) if plan is None else plan.mask.density.mean()
        for call, plan in _planned(strategy, calls)
    ]
    return float(torch.stack(densities).mean())


def error_of(strategy: Strategy, calls: list[RecordedCall]) -> float:
    """Relative L2 error of the attention output on the sampled rows, mean over the calls; 0 for a layer left dense.

    Half of the calls are those that the plan is made from, half the last that it serves.
    """
    errors = []
    for call, plan in _planned(strategy, calls):
        if plan is None:
            errors.append(torch.zeros((), device=call.query.device))
            continue
        output = plan.attend(
            call.query, call.key, call.value, key_length=call.call.key_length, scale=call.call.scale
        ).index_select(2, call.rows)
        errors.append((output.float() - call.exact).norm() / call.exact.norm())
    return float(torch.stack(errors).mean())


def _planned(strategy: Strategy, calls: list[RecordedCall]) -> list[tuple[RecordedCall, AttentionPlan | None]]:
    """Each call with the plan that would serve it, as a session keeps plans."""
    plans: dict[int, AttentionPlan | None] = {}
    pairs = []
    for call in calls:
        layer = call.call.layer
        kept = plans.get(layer)
        if call.age == 0 and (kept is None or not kept.lasts):
            plans[layer] = strategy.plan(call.query, call.key, call.value, call.call)
        pairs.append((call, plans[layer]))
    return pairs


def _exact(rows: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
    """Dense attention of some query rows [B, H, R, D], float32."""
    exists = None
    if call.key_length is not None:
        exists = (torch.arange(key.shape[2], device=key.device) < call.key_length[:, None])[:, None, None]
    query, key, value = (x.float() for x in (rows, key, value))
    return F.scaled_dot_product_attention(query, key, value, exists, scale=call.scale)

"""Whether sparse attention is worth it on this machine: each kind of call is timed once, sparse and dense.

So is dense attention that is quantized, against that of the model.
"""

from __future__ import annotations

import functools
import logging
import math
import time
import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from diffsparse.config import SparseAttentionConfig
from diffsparse.kernels.launch import is_captured, is_out_of_memory
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.strategy import Strategy

logger = logging.getLogger(__name__)

LEAST_SPEED_UP = 1.2
"""Of one attention call, its share of planning included. For less, the video that changes is not worth it."""
LEAST_ROUNDS, MOST_ROUNDS = 2, 8
ENOUGH_SECONDS = 0.5
"""Of timing, after which no more rounds are needed than the least: what takes long is disturbed less."""

_SPEED_UPS: dict[Hashable, float] = {}
"""By kind of call. Whoever timed it first is right for the whole process, so that one seed makes one video."""


class SpeedCheck:
    """Finds out at the first sparse call of each kind how much faster it is than the dense one.

    A kind is a shape, dtype and device of the keys, with a mask or without, and what is computed by the config. Where
    that says `min_tokens`, nothing is timed.

    Args:
        model_name: the transformer's class, for the warning.
        config: whose calls are timed.
        what: what computes them, in the reason why they are not worth it.
    """

    def __init__(self, model_name: str, config: SparseAttentionConfig, what: str = "sparse attention") -> None:
        self._model_name = model_name
        self._what = what
        # Of the config, what the time of a call depends on.
        self._computes = _mark_of(config.strategy), config.replan_every, config.backend, config.quantization
        self._times = config.min_tokens is None

    def knows(self, key: Tensor, mask: Tensor | None) -> bool:
        """Whether this kind of call was timed already, or is not to be."""
        return not self._times or self._kind(key, mask) in _SPEED_UPS or _cannot_wait(key)

    def why_slow(self, key: Tensor, mask: Tensor | None) -> str | None:
        """Why this kind of call is not worth being sparse; None where it is, or where nobody knows."""
        speed_up = _SPEED_UPS.get(self._kind(key, mask)) if self._times else None
        if speed_up is None or speed_up >= LEAST_SPEED_UP:
            return None
        return f"{self._what} is {speed_up:.2f}x as fast as dense attention here"

    def time(
        self,
        key: Tensor,
        mask: Tensor | None,
        dense: Callable[[], object],
        sparse: Callable[[AttentionPlan], object],
        plan: Callable[..., AttentionPlan | None],
        num_served: int,
    ) -> None:
        """Time this kind of call, and warn where it is not worth being sparse. Waits for the device.

        Of calls in turn the fastest of each counts, so that what else the machine does meanwhile weighs little. Where
        there is no memory to run dense attention in, or to time in at all, sparse attention stays. So it does where the
        strategy keeps the step in the middle dense, of which nothing can be timed.

        Args:
            key, mask: of the call, [B, H, S, D].
            dense: the attention of one layer.
            sparse: the same by a plan. It has run before, and so has `plan`.
            plan: makes one, for steps whose `progress` it is given. It is that of the middle: what strategies compute
                may fall from step to step.
            num_served: how many steps share a plan.
        """
        rounds: list[list[float]] = []
        speed_up = math.inf
        try:
            if (typical := plan(progress=0.5)) is not None:
                calls = dense, functools.partial(sparse, typical), functools.partial(plan, progress=0.5)
                while len(rounds) < LEAST_ROUNDS or (
                    len(rounds) < MOST_ROUNDS and sum(map(sum, rounds)) < ENOUGH_SECONDS
                ):
                    rounds.append([seconds_of(call, key.device) for call in calls])
                dense_seconds, sparse_seconds, plan_seconds = (min(seconds) for seconds in zip(*rounds))
                speed_up = dense_seconds / (sparse_seconds + plan_seconds / num_served)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        _SPEED_UPS.setdefault(self._kind(key, mask), speed_up)
        if (reason := self.why_slow(key, mask)) is not None:
            logger.warning(
                "diffsparse: self-attention of %s over %d tokens is left to the model: %s. min_tokens=0 ends that.",
                self._model_name,
                key.shape[2],
                reason,
            )

    def _kind(self, key: Tensor, mask: Tensor | None) -> Hashable:
        return key.device, key.dtype, key.shape, mask is None, self._computes


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Mean seconds of a call, until the device is done."""
    _wait_for(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait_for(device)
    return (time.perf_counter() - start) / repeats


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _cannot_wait(x: Tensor) -> bool:
    """Whether a graph is being captured, or nothing is computed at all."""
    return x.is_meta or is_captured(x.device)


def _mark_of(strategy: Strategy) -> Hashable:
    """What equal strategies share and no other has, not even one made after they are gone, as with an id or a hash."""
    try:
        # One that equals itself alone may hold much, and nobody will ask for it once it is gone.
        mark: object = weakref.ref(strategy) if type(strategy).__eq__ is object.__eq__ else strategy
        hash(mark)
    except TypeError:  # A strategy of the user's may have no hash, or no place for a weak reference.
        return object()
    return mark

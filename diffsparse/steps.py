"""Which denoising step this is, of how many, and for which guidance branch."""

from __future__ import annotations

import types
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_UNNAMED_BRANCHES = 4
"""Calls of one step that are taken for branches where nothing names them; one more is the next generation's."""


@dataclass(frozen=True)
class Step:
    """One call of a transformer within a generation.

    Attributes:
        index: 0 at the first denoising step.
        total: how many steps there are; None when nothing says so.
        branch: what tells apart the calls of one step (conditional, unconditional, …): a name, or a count where nothing
            names it.
        branch_is_named: whether something does. A call that nothing names may also be of another generation.
        is_first_of_generation: whether what was kept from earlier calls belongs to another generation.
    """

    index: int
    total: int | None
    branch: Hashable
    is_first_of_generation: bool
    branch_is_named: bool = False

    def is_within_first(self, fraction: float) -> bool:
        """Whether this step is among the first `fraction` of all; without a total, only step 0 is."""
        if self.total is None:
            return fraction > 0 and self.index == 0
        return self.index < round(fraction * self.total)


class StepClock:
    """Reads the step off whatever runs the denoising loop, once for each call of the transformer.

    Sources, best first: the step in the transformer's cache context; the guider of a modular pipeline; the
    scheduler's step index; a change of the timestep. Calls are never counted to find the step, since caches skip
    layers and whole calls.

    Args:
        pipeline: what owns the scheduler; None for a transformer enabled on its own. Held weakly.
    """

    def __init__(self, pipeline: Any = None) -> None:
        self._pipeline = weakref.ref(pipeline) if pipeline is not None else None
        self._context: Any = None
        self._last: Step | None = None
        self._branches: set[Hashable] = set()
        self._timestep: float | None = None
        self._index_by_timestep = 0
        self._falls = True

    def tick(self, timestep: Any) -> Step:
        """The step of the transformer call that begins now; `timestep` is what the call was given."""
        index, total, branch = self._read(timestep)
        last = self._last
        same_step = last is not None and index == last.index
        is_named = branch is not None
        if branch is None:
            branch = len(self._branches) % MAX_UNNAMED_BRANCHES if same_step else 0
        is_first = last is None or index < last.index or (same_step and branch in self._branches)
        self._branches = self._branches | {branch} if same_step and not is_first else {branch}
        self._last = Step(index, total, branch, is_first, is_named)
        return self._last

    @contextmanager
    def receive(self, name: str, step_index: int | None, total: int | None) -> Iterator[None]:
        """Take the calls within as those of cache context `name`."""
        self._context = (name, step_index, total)
        try:
            yield
        finally:
            self._context = None

    def _read(self, timestep: Any) -> tuple[int, int | None, Hashable]:
        """Step index, number of steps, and the branch if a source names it."""
        name, index, total = self._context or (None, None, None)
        if index is not None and total is not None:
            return index, total, name
        pipeline = self._pipeline() if self._pipeline is not None else None
        guider: Any = getattr(pipeline, "guider", None)
        if getattr(guider, "_step", None) is not None and getattr(guider, "_num_inference_steps", None):
            return guider._step, guider._num_inference_steps, name or getattr(guider, "_count_prepared", None)
        scheduler = getattr(pipeline, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if scheduler is not None and timesteps is not None and hasattr(scheduler, "_step_index"):
            begin = getattr(scheduler, "_begin_index", None) or 0
            current = scheduler._step_index
            return (begin if current is None else current), len(timesteps), name
        return self._by_timestep(timestep), None, name

    def _by_timestep(self, timestep: Any) -> int:
        """Steps counted by changes of the timestep's value; a change of direction starts a new generation.

        Reading the value waits for a GPU. It is the last resort, and once for each call of the transformer.
        """
        if isinstance(timestep, Tensor):
            timestep = timestep.detach().max().item()
        if timestep is None or timestep == self._timestep:
            return self._index_by_timestep
        if self._timestep is None:
            self._index_by_timestep = 0
        elif self._index_by_timestep == 0:
            self._falls, self._index_by_timestep = timestep < self._timestep, 1
        elif (timestep < self._timestep) == self._falls:
            self._index_by_timestep += 1
        else:
            self._index_by_timestep = 0
        self._timestep = timestep
        return self._index_by_timestep


class CacheContextReceiver:
    """Stands in for a transformer's `cache_context` and tells the clock what the pipeline says there.

    Set as an attribute of the transformer itself. A copy or pickle of the transformer gets its stock method back.
    """

    def __init__(self, transformer: torch.nn.Module, clock: StepClock) -> None:
        self._transformer = weakref.ref(transformer)
        self._clock = clock

    @contextmanager
    def __call__(self, name: str, **fields: Any) -> Iterator[None]:
        """As `CacheMixin.cache_context` of diffusers."""
        step = self._clock.receive(name, fields.get("step_index"), fields.get("num_inference_steps"))
        # Looked up anew, since a method kept here would keep the transformer alive.
        with step, _stock_cache_context(self._transformer())(name, **fields):
            yield

    def __reduce__(self) -> tuple[Any, ...]:
        return _stock_cache_context, (self._transformer(),)


def _stock_cache_context(transformer: Any) -> Any:
    return types.MethodType(type(transformer).cache_context, transformer)

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
from torch._subclasses.fake_tensor import is_fake

MAX_UNNAMED_BRANCHES = 4
"""Calls of one step that are taken for branches where nothing names them; one more is the next generation's."""

MAX_TILES = 16
"""The same where a schedule says which step it is: tiles of a large frame, too, are calls of one step."""


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
        is_last_of_generation: whether this is the last call of the last step, as far as the steps before it say how
            many calls there are. False where nothing says how many steps there are.
        sparse_from, sparse_until: the steps before the one and from the other on (None for the last) do not run, or
            stay dense whatever the config says: a generation that begins late, a window of another program.
    """

    index: int
    total: int | None
    branch: Hashable
    is_first_of_generation: bool
    branch_is_named: bool = False
    is_last_of_generation: bool = False
    sparse_from: int = 0
    sparse_until: int | None = None

    def is_within_first(self, fraction: float) -> bool:
        """Whether this step is among the first `fraction` of all; without a total, only step 0 is."""
        if self.total is None:
            return fraction > 0 and self.index == 0
        return self.index < round(fraction * self.total)

    def progress_beyond(self, fraction: float, num_served: int) -> float | None:
        """How far the steps beyond the first `fraction` have come in the middle of the next `num_served`: 0–1.

        This step is the first of those served, of which there may be fewer left. None without a total.
        """
        if self.total is None:
            return None
        first = max(round(fraction * self.total), self.sparse_from)
        return progress(self.index, num_served, first, self.total if self.sparse_until is None else self.sparse_until)


def progress(index: int, num_served: int, first: int, end: int) -> float:
    """Where from step `first` to before step `end` the middle of `num_served` steps from `index` on lies, 0–1.

    These steps are among them, whatever the two say.
    """
    first, end = min(first, index), max(end, index + 1)
    middle = index + min(num_served, end - index) / 2
    return (middle - first) / (end - first)


class StepClock:
    """Reads the step off whatever runs the denoising loop, once for each call of the transformer.

    Sources, best first: the step in the transformer's cache context; the scheduler's step index, while it moves with
    the calls; the timestep's place in the scheduler's; the guider of a modular pipeline, while it moves; a change of
    the timestep. The guider names the branch in any case. Calls are never counted to find the step, since caches skip
    layers and whole calls.

    Args:
        pipeline: what owns the scheduler; None for a transformer enabled on its own. Held weakly. Once it is gone,
            its scheduler and guider go on: a pipeline made of its parts (`from_pipe`) runs the transformer with them.
        name: what the pipeline calls the transformer. `transformer_2` has a guider of its own, `guider_2`, where there
            is one.
    """

    def __init__(self, pipeline: Any = None, name: str = "transformer") -> None:
        self._pipeline = weakref.ref(pipeline) if pipeline is not None else None
        self._parts: dict[str, Any] = {}
        self._guiders = name.replace("transformer", "guider"), "guider"
        for part in ("scheduler", *self._guiders):
            self._part(part)
        self._context: Any = None
        self._last: Step | None = None
        self._timesteps_before: Any = None
        self._branches: set[Hashable] = set()
        self._calls_of_step_before: int | None = None
        self._watch, self._guider_watch = _LoopWatch(), _LoopWatch()
        self._schedule: tuple[Any, list[float] | None] = (None, None)
        self._begun: tuple[Any, int] = (None, 0)
        self._timestep: float | None = None
        self._index_by_timestep = 0
        self._falls = True

    def tick(self, timestep: Any) -> Step:
        """The step of the transformer call that begins now; `timestep` is what the call was given."""
        index, total, branch, begins_at = self._read(timestep)
        last = self._last
        # A generation that begins late, or a second expert, may go on behind where the last one was interrupted.
        timesteps = self._scheduled_timesteps()
        rescheduled = timesteps is not None and timesteps is not self._timesteps_before
        self._timesteps_before = timesteps
        same_step = last is not None and index == last.index and not rescheduled
        is_named = branch is not None
        if branch is None:
            most = MAX_UNNAMED_BRANCHES if total is None else MAX_TILES
            branch = len(self._branches) % most if same_step else 0
        is_first = last is None or index < last.index or (same_step and branch in self._branches) or rescheduled
        if is_first:
            self._calls_of_step_before = None
        elif not same_step:
            self._calls_of_step_before = len(self._branches)
        self._branches = self._branches | {branch} if same_step and not is_first else {branch}
        is_last = index + 1 == total and len(self._branches) == self._calls_of_step_before
        self._last = Step(index, total, branch, is_first, is_named, is_last, sparse_from=begins_at)
        return self._last

    @contextmanager
    def receive(self, name: str, step_index: int | None, total: int | None) -> Iterator[None]:
        """Take the calls within as those of cache context `name`."""
        self._context = (name, step_index, total)
        try:
            yield
        finally:
            self._context = None

    def _scheduled_timesteps(self) -> Any:
        """What the pipeline's scheduler has from its `set_timesteps`, made anew for each generation; None without."""
        # As an attribute it was set, and is no property, which may make it anew each time.
        return getattr(self._part("scheduler"), "__dict__", {}).get("timesteps")

    def _part(self, name: str) -> Any:
        """What the pipeline has under this name now, or had when it was last asked; None without."""
        pipeline = self._pipeline() if self._pipeline is not None else None
        if pipeline is not None:
            self._parts[name] = getattr(pipeline, name, None)
        return self._parts.get(name)

    def _read(self, timestep: Any) -> tuple[int, int | None, Hashable, int]:
        """Step index, number of steps, the branch if a source names it, and the step that comes first."""
        name, index, total = self._context or (None, None, None)
        if index is not None and total is not None:
            return index, total, name, 0
        guider: Any = next((part for part in map(self._part, self._guiders) if part is not None), None)
        is_guided = getattr(guider, "_step", None) is not None and getattr(guider, "_num_inference_steps", None)
        if is_guided:
            # SmoothedEnergyGuidance leaves this count at 0.
            count = getattr(guider, "_count_prepared", None) or None
            is_guided = self._guider_watch.takes_part(guider, guider._step, timestep, count)
            name = name or (count if is_guided else None)
        scheduler = self._part("scheduler")
        timesteps: Any = getattr(scheduler, "timesteps", None)
        has_index = timesteps is not None and hasattr(scheduler, "_step_index")
        # One that nobody has told how many steps there are runs no loop.
        is_told = getattr(scheduler, "num_inference_steps", None) is not None
        if has_index:
            current, begin = scheduler._step_index, getattr(scheduler, "_begin_index", None)
            if current is None and is_told:
                current = begin if begin is not None else self._beginning(timestep, timesteps)
            if begin is None:
                begin = self._begun[1] if self._begun[0] is timesteps else 0
            has_ended = current is not None and current >= len(timesteps)
            if current is not None and self._watch.takes_part(timesteps, current, timestep, name, has_ended):
                return current, _num_steps(scheduler), name, begin
        # One that was told how many steps there are and takes none may have copies that run the loop, or not count.
        if has_index and (scheduler._step_index is not None or not is_told):
            timesteps = None
        index, total = self._by_timestep(timestep, timesteps)
        if total is None and is_guided:
            return guider._step, guider._num_inference_steps, name, 0
        return index, total, name, 0 if total is None else self._beginning(timestep, timesteps)

    def _beginning(self, timestep: Any, timesteps: Any) -> int:
        """The place in `timesteps` of the first `timestep` since they were made; 0 where it is not among them.

        Some pipelines begin in the middle of the schedule and do not tell the scheduler, which says so after its
        first step. Some hand over a share of 1000: 1 is then the first timestep, and may be the last by the schedule.
        """
        if self._begun[0] is not timesteps:
            schedule, value = torch.as_tensor(timesteps).tolist(), _value(timestep)
            is_share = value == 1 and schedule[0] > 1
            self._begun = timesteps, 0 if is_share else _place(value, timestep, schedule) or 0
        return self._begun[1]

    def _by_timestep(self, timestep: Any, timesteps: Any) -> tuple[int, int | None]:
        """Step index and number of steps by the timestep's value: its place in `timesteps`, or counted by its changes.

        Counted, a change of direction starts a new generation, and the number of steps is None. It is counted where
        `timesteps` is None, or has not had a value that came since it was made: another loop runs the transformer.
        """
        value = _value(timestep)
        counted = self._count_changes(value)
        if self._schedule[0] is not timesteps:
            self._schedule = timesteps, None if timesteps is None else torch.as_tensor(timesteps).tolist()
        schedule = self._schedule[1]
        place = None if schedule is None else _place(value, timestep, schedule)
        if schedule is None or place is None:
            self._schedule = timesteps, None
            return counted, None
        return place, len(schedule)

    def _count_changes(self, value: float | None) -> int:
        if value is None or value == self._timestep:
            return self._index_by_timestep
        if self._timestep is None:
            self._index_by_timestep = 0
        elif self._index_by_timestep == 0:
            self._falls, self._index_by_timestep = value < self._timestep, 1
        elif (value < self._timestep) == self._falls:
            self._index_by_timestep += 1
        else:
            self._index_by_timestep = 0
        self._timestep = value
        return self._index_by_timestep


def _num_steps(scheduler: Any) -> int:
    """How many timesteps of the scheduler are run: not the end, where it has no more sigmas than timesteps."""
    sigmas = getattr(scheduler, "sigmas", None)
    has_end = isinstance(sigmas, Tensor) and len(sigmas) == len(scheduler.timesteps)
    return len(scheduler.timesteps) - has_end


class _LoopWatch:
    """Finds out whether a pipeline's scheduler, or its guider, takes part in the loop that calls the transformer.

    It does not where the user runs a loop of their own with another scheduler: the pipeline's then stands still while
    the timesteps change. That of the distilled Helios always does. Comparing these waits for a GPU, so it is done only
    where a branch comes again, or more calls have come than branches explain.
    """

    def __init__(self) -> None:
        self._schedule: Any = None
        self._index = -1
        self._first_timestep: Any = None
        self._calls = 0
        self._branches: set[Hashable] = set()
        self._takes_part = True

    def takes_part(self, schedule: Any, index: int, timestep: Any, branch: Hashable, has_ended: bool = False) -> bool:
        """Whether a call with `timestep` may be of step `index` of this very `schedule`, unless that `has_ended`."""
        if schedule is not self._schedule or index != self._index:
            self._schedule, self._index, self._first_timestep = schedule, index, timestep
            self._calls, self._branches, self._takes_part = 0, set(), not has_ended
        self._calls += 1
        comes_again = branch in self._branches
        if branch is not None:
            self._branches.add(branch)
        if self._takes_part and (comes_again or self._calls > MAX_UNNAMED_BRANCHES):
            self._takes_part = _value(timestep) == _value(self._first_timestep)
        return self._takes_part


def _value(timestep: Any) -> float | None:
    """A timestep as a number, the largest where there are many. Reading it off a GPU waits for it.

    None on the meta device and of a fake tensor, where operations are counted or traced and nothing is computed.
    """
    if not isinstance(timestep, Tensor):
        return timestep
    return None if timestep.is_meta or is_fake(timestep) else timestep.detach().max().item()


def _place(value: float | None, timestep: Any, schedule: list[float]) -> int | None:
    """Where in a schedule `value`, that of `timestep`, stands; None where it does not.

    Pipelines hand timesteps over in the dtype of the model, those of Helios without their fractions.
    """
    if isinstance(timestep, Tensor) and value is not None:
        schedule = torch.tensor(schedule, dtype=torch.float64, device="cpu").to(timestep.dtype).tolist()
    return schedule.index(value) if value is not None and value in schedule else None


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

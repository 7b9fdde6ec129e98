"""Which step a call is of, and whether it lies in the share of the sampling that is to be sparse."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A sigma that a sampler computed may differ from the schedule's in its last bits.
_SAME_SIGMA = 1e-4

FEW_STEPS = 8
"""Schedules up to this long are those of distilled models. There the first step alone lays out the scene."""


@dataclass(frozen=True)
class Window:
    """The share of the sampling that is sparse, as ComfyUI's own nodes mean it.

    Attributes:
        sigma_start, sigma_end: sparse where `sigma_end <= sigma <= sigma_start`.
        first_step_only: whether no step but the first stays dense for coming early. A schedule that starts further
            down has no early step.
    """

    sigma_start: float
    sigma_end: float
    first_step_only: bool

    def why_dense(self, sigma: float, step: int) -> str | None:
        """Why a call at this step stays dense; None where it does not."""
        if sigma < self.sigma_end * (1 - _SAME_SIGMA):
            return "late step"
        if sigma <= self.sigma_start * (1 + _SAME_SIGMA):
            return None
        return None if self.first_step_only and step > 0 else "early step"

    def sparse_steps(self, sigmas: Sequence[float]) -> tuple[int, int]:
        """The first sparse step of a schedule, and the one after the last; all where none is."""
        total = len(sigmas) - 1
        steps = [step for step, sigma in enumerate(sigmas[:-1]) if self.why_dense(sigma, step) is None]
        return (steps[0], steps[-1] + 1) if steps else (0, total)


def has_few_steps(sigmas: Sequence[float], percent_to_sigma: Callable[[float], float]) -> bool:
    """Whether a schedule has at most `FEW_STEPS` steps, the rest of it counted where `sigmas` is only its beginning.

    So it is for the first expert of Wan 2.2: 8 steps that end half way are half of 16.
    """
    total = len(sigmas) - 1
    # Where so many of the fewest steps end, give or take the half of one for schedules that begin slowly.
    return total <= FEW_STEPS and sigmas[-1] <= percent_to_sigma((total - 0.5) / FEW_STEPS)


def whole_schedule(sigmas: Sequence[float], of_run: Sequence[float]) -> Sequence[float]:
    """The schedule of the run where `sigmas` are a part of it, which another node may sample one by one."""
    starts = range(len(of_run) - len(sigmas) + 1)
    return of_run if any(of_run[start : start + len(sigmas)] == sigmas for start in starts) else sigmas


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """The step of a schedule `sigmas`, up to the end of the last step, that `sigma` belongs to.

    Samplers of second order ask for sigmas between those of the schedule: they belong to the step that is under way.
    One that adds noise to an image step by step, as after FlipSigmas, has a schedule that rises.
    """
    if sigmas[0] < sigmas[-1]:
        begun = sum(1 for start in sigmas[:-1] if sigma >= start * (1 - _SAME_SIGMA))
    else:
        begun = sum(1 for start in sigmas[:-1] if sigma <= start * (1 + _SAME_SIGMA))
    return max(0, begun - 1)


class Branches:
    """Tells apart the calls of one step by the conditions that they are for.

    Conditions of one kind (prompts of different regions) have plans of their own. The first of each kind share theirs,
    as guidance branches do: their errors then point the same way, and guidance does not amplify them.
    """

    def __init__(self) -> None:
        self._seen: dict[Any, list[Any]] = {}

    def name(self, transformer_options: Mapping[str, Any]) -> Hashable:
        """A name for the branch of a call, the same at each step. A context window is a branch of its own."""
        places = []
        kinds, uuids = transformer_options.get("cond_or_uncond", ()), transformer_options.get("uuids", ())
        for kind, uuid in zip(kinds, uuids):
            seen = self._seen.setdefault(kind, [])
            if uuid not in seen:
                seen.append(uuid)
            places.append(seen.index(uuid))
        window = transformer_options.get("context_window")
        return tuple(places), tuple(getattr(window, "index_list", ()))

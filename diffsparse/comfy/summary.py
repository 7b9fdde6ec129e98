"""What ran in one sampling: the line under the node and in ComfyUI's log."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable
from statistics import mean

from diffsparse.session import Session


class RunClock:
    """Which steps ran, how long each took, and which of them had sparse attention.

    A step ends where the next begins; the last one where the run ends. One that a cache of another node answers in the
    model's place is none.
    """

    def __init__(self) -> None:
        self.total: int | None = None
        self._begun: dict[int, float] = {}
        self._seconds: dict[int, float] = {}
        self._sparse: dict[int, bool] = {}
        """By step in which the model ran."""
        self._runs: Counter[int] = Counter()
        """How often it did."""
        self._current: int | None = None
        self._last = 0
        # ComfyUI has a thread for each of several GPUs, which begin a step at once.
        self._lock = threading.RLock()

    def tick(self, step: int, total: int) -> None:
        """A call of the model begins, at this step of so many."""
        with self._lock:
            self.total = total
            if step != self._current:
                self.stop()
                self._current = self._last = step
                self._begun[step] = time.perf_counter()

    def mark_run(self, sparse: bool) -> None:
        """In the step that is under way the model runs, with sparse attention or not."""
        with self._lock:
            if self._current is not None:
                self._sparse[self._current] = sparse or self._sparse.get(self._current, False)
                self._runs[self._current] += 1

    def stop(self) -> None:
        """The step that is under way is over."""
        with self._lock:
            if self._current is not None and self._current in self._sparse:
                took = time.perf_counter() - self._begun[self._current]
                self._seconds[self._current] = self._seconds.get(self._current, 0.0) + took
            self._current = None

    def describe(self, finished: bool) -> str:
        """Steps and seconds, as in "14 of 20 steps sparse; 3.20 s a sparse step, 5.10 s a dense one"."""
        if not self._seconds:
            why = (
                ": there was no step to run, or another node calls the model in a way of its own, and it ran in full"
                if finished
                else ""
            )
            return f"no call of the model came to this node{why}"
        sparse = {step: seconds for step, seconds in self._seconds.items() if self._sparse[step]}
        dense = {step: seconds for step, seconds in self._seconds.items() if not self._sparse[step]}
        ran = len(self._seconds)
        stopped = "" if finished else f"stopped in step {self._last + 1} of {self.total}: "
        times = [
            f"{mean(steps.values()):.2f} s a {name} step"
            for name, steps in (("sparse", sparse), ("dense", dense))
            if steps
        ]
        slower = bool(len(sparse) > 1 and dense) and self._fastest(sparse) > self._fastest(dense)
        hint = " (at their fastest, sparse steps are slower here: raise min_tokens)" if slower else ""
        return f"{stopped}{len(sparse)} of {ran} steps sparse; {', '.join(times)}{hint}"

    def _fastest(self, steps: dict[int, float]) -> float:
        """Seconds of one run of the model, of which some samplers make fewer in their first step or their last.

        The least, since the first step of its kind also loads, compiles, plans or tests: one alone is no sign.
        """
        return min(seconds / self._runs[step] for step, seconds in steps.items())


def summarize(clock: RunClock, sessions: Iterable[Session], finished: bool) -> str:
    """One line: steps, seconds, calls, density, and the reasons of dense calls."""
    tallies = [tally for session in sessions for tally in session.tallies]
    parts = [f"DiffSparse: {clock.describe(finished)}"]
    densities = [float(tally.density.mean()) for tally in tallies if tally.density is not None]
    if sparse_calls := sum(tally.sparse_calls for tally in tallies):
        parts.append(f"density {100 * sum(densities) / sparse_calls:.0f} % in {sparse_calls} attention calls")
    reasons: Counter[str] = sum((tally.dense_reasons for tally in tallies), Counter())
    if reasons:
        each = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
        parts.append(f"dense in {reasons.total()}: {each}")
    return "; ".join(parts)

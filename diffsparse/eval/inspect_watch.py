"""Watches a pipeline run: what each head keeps at each step, and the attention maps of some heads."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from torch import Tensor

from diffsparse.config import SparseAttentionConfig
from diffsparse.eval.generate import sparse_attention
from diffsparse.eval.inspect_maps import MapPair, attention_maps
from diffsparse.eval.inspect_measures import Attended, HeadMeasure, measure
from diffsparse.grid import TokenGrid
from diffsparse.plan import AttentionPlan
from diffsparse.report import SparseAttentionReport
from diffsparse.strategies.strategy import AttentionCall, Strategy


class Head(NamedTuple):
    """A head of a transformer."""

    transformer: str
    layer: int
    head: int


class Place(NamedTuple):
    """One layer at one step."""

    transformer: str
    step: int
    layer: int


@dataclass(eq=False)
class Watch:
    """What has been seen so far.

    A layer is measured at its first attention call of each step, which is that of the first guidance branch.

    Args:
        map_steps: the steps of whose attention maps are made.
        map_heads: layer and head of those that maps are made of, in every transformer; None for those that stand out
            at the first of the steps, see `stand_outs`.
    """

    map_steps: tuple[int, ...]
    map_heads: tuple[tuple[int, int], ...] | None
    measures: dict[Place, tuple[HeadMeasure, ...]] = field(default_factory=dict)
    dense_reasons: dict[Place, str] = field(default_factory=dict)
    maps: dict[tuple[Head, int], MapPair] = field(default_factory=dict)
    step: int = 0
    transformer: str = ""
    report: SparseAttentionReport | None = None
    chosen: dict[str, dict[Head, str]] = field(default_factory=dict)
    """Of each transformer, the heads that stand out, with why; empty where the heads were named."""
    _counted: dict[tuple[str, int], Counter[str]] = field(default_factory=dict)
    _chosen_at: dict[str, int] = field(default_factory=dict)

    def see(self, layer: int, call: Attended) -> None:
        """An attention call of a layer has run by a plan.

        Raises:
            ValueError: its numbers are not finite, or a head to be drawn is not there.
        """
        place = Place(self.transformer, self.step, layer)
        if place in self.measures:
            return
        measures = measure(call)
        for number, of_head in enumerate(measures):
            numbers = (of_head.recall, of_head.error, of_head.incoherence_own_order, of_head.incoherence_plan_order)
            if not all(map(math.isfinite, numbers)):
                raise ValueError(
                    f"There is nothing to measure: the attention of {place.transformer}, layer {layer}, head {number}, "
                    f"at step {place.step} holds infinity or what is not a number. Look whether the dense video is "
                    f"whole; if it is not, load the model in another dtype."
                )
        self.measures[place] = measures
        if self.step in self.map_steps:
            for head in self._heads_to_draw(layer, call.query.shape[1]):
                self.maps[head, self.step] = attention_maps(call, head.head)

    def end_step(self, report: SparseAttentionReport) -> None:
        """A denoising step is over. What the report has counted since the last one says why layers were dense."""
        for transformer in report.transformers:
            for layer, reasons in enumerate(transformer.layer_dense_reasons):
                now = Counter(reasons)
                new = now - self._counted.get((transformer.name, layer), Counter())
                self._counted[transformer.name, layer] = now
                place = Place(transformer.name, self.step, layer)
                if new and place not in self.measures:
                    self.dense_reasons[place] = new.most_common(1)[0][0]
        self.report = report
        self.step += 1

    def _heads_to_draw(self, layer: int, num_heads: int) -> list[Head]:
        """Those of a layer, as far as the layers before it show."""
        name = self.transformer
        if self.map_heads is not None:
            for chosen_layer, head in self.map_heads:
                if chosen_layer == layer and head >= num_heads:
                    raise ValueError(f"--heads {layer}:{head}: layer {layer} of {name} has heads 0 to {num_heads - 1}.")
            return [Head(name, layer, head) for chosen_layer, head in self.map_heads if chosen_layer == layer]
        if self._chosen_at.setdefault(name, self.step) == self.step:
            of_this_step = {
                Head(name, place.layer, number): head
                for place, heads in self.measures.items()
                if (place.transformer, place.step) == (name, self.step)
                for number, head in enumerate(heads)
            }
            self.chosen[name] = stand_outs(of_this_step)
            for drawn, step in list(self.maps):
                if drawn.transformer == name and drawn not in self.chosen[name]:
                    del self.maps[drawn, step]
        return [head for head in self.chosen[name] if head.layer == layer]


def stand_outs(measures: dict[Head, HeadMeasure]) -> dict[Head, str]:
    """The heads with the largest error of all, and the smallest and largest of each class, with what they stand for.

    A head that stands out among all does so among the first of them as well.
    """
    by_error = sorted(measures, key=lambda head: measures[head].error)
    # Of equal keys, what comes last stays.
    smallest = {measures[head].head_class: head for head in reversed(by_error)}
    largest = {measures[head].head_class: head for head in by_error}
    found = {by_error[-1]: "the largest error of all heads"}
    for kind, of_class in (("smallest", smallest), ("largest", largest)):
        for name, head in of_class.items():
            found.setdefault(head, f"the {kind} error of the {name} heads")
    return found


@contextmanager
def watching(pipe: Any, config: SparseAttentionConfig, watch: Watch) -> Iterator[Callable[[], None]]:
    """Sparse attention enabled on a pipeline, and watched; what it makes stays the same, bit by bit.

    Gives what to call after each denoising step.
    """
    watched = replace(config, strategy=_Watched(config.strategy, watch))
    with sparse_attention(pipe, watched) as report, ExitStack() as hooks:
        for name in [transformer.name for transformer in report().transformers]:
            hook = getattr(pipe, name).register_forward_pre_hook(functools.partial(_is_called, watch, name))
            hooks.callback(hook.remove)
        yield lambda: watch.end_step(report())


def _is_called(watch: Watch, name: str, *_: Any) -> None:
    watch.transformer = name


@dataclass(frozen=True)
class _Watched:
    """The plans of another strategy, each of which shows what it runs."""

    strategy: Strategy
    watch: Watch

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan | None:
        """The plan of a layer; see `Strategy.plan`."""
        plan = self.strategy.plan(query, key, value, call)
        if plan is None:
            return None
        same = {each.name: getattr(plan, each.name) for each in fields(AttentionPlan)}
        return _WatchedPlan(**same, watch=self.watch, layer=call.layer, grid=call.grid)


@dataclass(frozen=True, eq=False)
class _WatchedPlan(AttentionPlan):
    """A plan that shows what it was given and what it made of it."""

    watch: Watch = None  # type: ignore[assignment]
    layer: int = 0
    grid: TokenGrid = None  # type: ignore[assignment]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_length: Tensor | None = None,
        scale: float | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """See `AttentionPlan.attend`."""
        output = super().attend(query, key, value, key_length=key_length, scale=scale, backend=backend)
        self.watch.see(self.layer, Attended(self, query, key, value, output, self.grid, key_length, scale))
        return output

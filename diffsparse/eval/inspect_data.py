"""All numbers of an inspected run as plain lists, dicts and numbers, ready for JSON and for the page."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from diffsparse.eval.inspect_measures import HeadMeasure
from diffsparse.eval.inspect_watch import Head, Place, Watch
from diffsparse.report import TransformerReport

DENSE = "dense"
NOT_CALLED = "its attention was not called"
EXACT = {
    "class": DENSE,
    "density": 1.0,
    "recall": 1.0,
    "error": 0.0,
    "tail": False,
    "skipped": False,
    "incoherence_own_order": None,
    "incoherence_plan_order": None,
}
"""What stands for a head of a dense layer: it has no blocks, which could be hard to quantize."""


def collect(watch: Watch, num_steps: int) -> dict[str, Any]:
    """What a watch has seen in a run of so many steps.

    `summary` has means over the sparse calls, `transformers` every head at every step and over them, `maps` what the
    drawn heads are drawn for. Recall, error and incoherence are None where nothing ran sparse.
    """
    assert watch.report is not None
    transformers = [_transformer(watch, report, num_steps) for report in watch.report.transformers]
    heads = [head for each in transformers for head in each["heads"] if head["sparse_steps"]]
    measures = [measure for measures in watch.measures.values() for measure in measures]
    recalls = [measure.recall for measure in measures]
    worst = max(heads, key=lambda head: head["error"], default=None)
    return {
        "summary": {
            "density": watch.report.density,
            "overall_density": watch.report.overall_density,
            "recall": _mean(recalls),
            "recall_5th_percentile": float(np.percentile(recalls, 5)) if recalls else None,
            "error": _mean([measure.error for measure in measures]),
            "incoherence_own_order": _mean([measure.incoherence_own_order for measure in measures]),
            "incoherence_plan_order": _mean([measure.incoherence_plan_order for measure in measures]),
            "worst_head": None
            if worst is None
            else {key: worst[key] for key in ("transformer", "layer", "head", "error")},
        },
        "transformers": transformers,
        "map_steps": list(watch.map_steps),
        "maps": [_map(watch, head, step) for head, step in sorted(watch.maps)],
    }


def _transformer(watch: Watch, report: TransformerReport, num_steps: int) -> dict[str, Any]:
    # A transformer that was never called, as the second expert of a short run, has no heads to speak of.
    places = [
        [_layer(watch, Place(report.name, step, layer), report.num_heads) for layer in range(report.num_layers)]
        for step in range(num_steps)
    ]
    return {
        "name": report.name,
        "family": report.family,
        "num_layers": report.num_layers,
        "num_heads": report.num_heads,
        "sparse_calls": report.sparse_calls,
        "dense_calls": report.dense_calls,
        "dense_reasons": report.dense_reasons,
        "unreached_layers": report.unreached_layers,
        "heads": [
            _over_steps(report.name, layer, head, [step[layer] for step in places])
            for layer in range(report.num_layers)
            for head in range(report.num_heads)
        ],
        "steps": [{"step": step, "layers": layers} for step, layers in enumerate(places)],
    }


def _layer(watch: Watch, place: Place, num_heads: int) -> dict[str, Any]:
    """The heads of one layer at one step, or why it was dense."""
    if place in watch.measures:
        return {"dense": None, "heads": [_as_dict(measure) for measure in watch.measures[place]]}
    return {"dense": watch.dense_reasons.get(place, NOT_CALLED), "heads": [dict(EXACT) for _ in range(num_heads)]}


def _over_steps(transformer: str, layer: int, head: int, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """A head's means over the steps where it was sparse; what is exact where it never was."""
    sparse = {step: of_step["heads"][head] for step, of_step in enumerate(layers) if of_step["dense"] is None}
    classes = Counter(measure["class"] for measure in sparse.values())
    reasons = Counter(of_step["dense"] for of_step in layers if of_step["dense"] is not None)
    means = {name: _mean([m[name] for m in sparse.values()]) if sparse else EXACT[name] for name in _MEANS}
    return {
        "transformer": transformer,
        "layer": layer,
        "head": head,
        "class": classes.most_common(1)[0][0] if classes else DENSE,
        "classes": dict(classes.most_common()),
        **means,
        "largest_error": max((m["error"] for m in sparse.values()), default=0.0),
        "largest_error_at_step": max(sparse, key=lambda step: sparse[step]["error"], default=None),
        "tail_steps": sum(m["tail"] for m in sparse.values()),
        "sparse_steps": len(sparse),
        "dense_reasons": dict(reasons.most_common()),
    }


_MEANS = ("density", "recall", "error", "incoherence_own_order", "incoherence_plan_order")


def _map(watch: Watch, head: Head, step: int) -> dict[str, Any]:
    pair = watch.maps[head, step]
    measure = watch.measures[Place(head.transformer, step, head.layer)][head.head]
    return {
        **head._asdict(),
        "step": step,
        "file": f"map_{head.transformer}_layer{head.layer}_head{head.head}_step{step}.png",
        "why": watch.chosen.get(head.transformer, {}).get(head),
        "order": pair.after.order,
        "tokens_a_cell": pair.after.cell,
        **_as_dict(measure),
    }


def _as_dict(measure: HeadMeasure) -> dict[str, Any]:
    values = vars(measure).copy()
    return {"class": values.pop("head_class"), **values}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None

"""What ran: the honest account of an enabled transformer."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffsparse.heads import HeadClass
from diffsparse.session import LayerTally, Session


@dataclass(frozen=True)
class TransformerReport:
    """What ran in one transformer since sparse attention was enabled.

    Attributes:
        name: the pipeline's name for it, or its class.
        family: the model family; None for a transformer that no family describes.
        num_layers, num_heads: of self-attention.
        sparse_calls, dense_calls: attention calls, one for each layer and call of the transformer.
        dense_reasons: dense calls by reason; of those that `dense_quantization` computed it ends in what they were in.
        density: share of key blocks computed exactly, mean over the sparse calls; None before the first.
        overall_density: the same with every dense call counted as 1; None before the first call.
        head_classes: name of the class of every head, [layer][head], as last planned; "dense" where none is.
        head_densities: density of every head, [layer][head], mean over the sparse calls; 1 where there is none.
        precisions: sparse calls by what they were computed in; "native" is the dtype of the model.
        layer_dense_reasons: dense calls of each layer by reason, [layer].
        unreached_layers: layers that run their own attention now, or did in the last call of the transformer, and whose
            calls nothing above counts, by reason.
    """

    name: str
    family: str | None
    num_layers: int
    num_heads: int
    sparse_calls: int
    dense_calls: int
    dense_reasons: dict[str, int]
    density: float | None
    overall_density: float | None
    head_classes: list[list[str]]
    head_densities: list[list[float]]
    unreached_layers: dict[str, int] = field(default_factory=dict)
    precisions: dict[str, int] = field(default_factory=dict)
    layer_dense_reasons: list[dict[str, int]] = field(default_factory=list)

    @property
    def class_shares(self) -> dict[str, float]:
        """Share of the heads in each head class, largest first."""
        names = Counter(name for layer in self.head_classes for name in layer)
        return {name: count / names.total() for name, count in names.most_common()} if names else {}


@dataclass(frozen=True)
class SparseAttentionReport:
    """What ran in all transformers of a pipeline. Prints as a table; `as_dict` is ready for JSON."""

    transformers: tuple[TransformerReport, ...]

    @property
    def density(self) -> float | None:
        """Share of key blocks computed exactly, mean over the sparse calls; None before the first."""
        return _mean((t.density, t.sparse_calls) for t in self.transformers)

    @property
    def overall_density(self) -> float | None:
        """The same with every dense call counted as 1; None before the first call."""
        return _mean((t.overall_density, t.sparse_calls + t.dense_calls) for t in self.transformers)

    def as_dict(self) -> dict[str, Any]:
        """Fields and figures as plain lists, dicts and numbers."""
        transformers = [dataclasses.asdict(t) | {"class_shares": t.class_shares} for t in self.transformers]
        return {"density": self.density, "overall_density": self.overall_density, "transformers": transformers}

    def __str__(self) -> str:
        return "\n\n".join(_as_table(report) for report in self.transformers)


def make_report(sessions: Mapping[str, Session]) -> SparseAttentionReport:
    """The report of the sessions of one pipeline, by component name."""
    return SparseAttentionReport(tuple(_of_session(name, session) for name, session in sessions.items()))


def _of_session(name: str, session: Session) -> TransformerReport:
    tallies = session.tallies
    reasons: Counter[str] = sum((tally.dense_reasons for tally in tallies), Counter())
    precisions: Counter[str] = sum((tally.precisions for tally in tallies), Counter())
    sparse_calls = sum(tally.sparse_calls for tally in tallies)
    densities = [_head_densities(tally, session.num_heads) for tally in tallies]
    density = _mean((_mean((d, 1) for d in row), tally.sparse_calls) for row, tally in zip(densities, tallies))
    return TransformerReport(
        name=name,
        family=session.family.name if session.layer_names else None,
        num_layers=len(tallies),
        num_heads=session.num_heads,
        sparse_calls=sparse_calls,
        dense_calls=reasons.total(),
        dense_reasons=dict(reasons.most_common()),
        density=density,
        overall_density=_mean([(density, sparse_calls), (1.0, reasons.total())]),
        head_classes=[_head_classes(tally, session.num_heads) for tally in tallies],
        head_densities=densities,
        unreached_layers=dict(Counter(filter(None, map(session.why_not_counted, range(len(tallies)))))),
        precisions=dict(precisions.most_common()),
        layer_dense_reasons=[dict(tally.dense_reasons.most_common()) for tally in tallies],
    )


def _head_densities(tally: LayerTally, heads: int) -> list[float]:
    if tally.density is None:
        return [1.0] * heads
    mean: list[float] = (tally.density / tally.sparse_calls).expand(heads).tolist()
    return mean


def _head_classes(tally: LayerTally, heads: int) -> list[str]:
    if tally.classes is None:
        return ["dense" if tally.sparse_calls == 0 else "unclassed"] * heads
    return [HeadClass(number).name.lower() for number in tally.classes.tolist()]


def _mean(weighted: Any) -> float | None:
    """The mean of (value, weight) pairs; what has no value yet has no weight."""
    pairs = [(value, weight) for value, weight in weighted if weight]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None


def _as_table(report: TransformerReport) -> str:
    classes = ", ".join(f"{_percent(share)} {name}" for name, share in report.class_shares.items())
    rows = [
        ("transformer", f"{report.name} ({report.family or 'no known family'})"),
        ("self-attention", f"{report.num_layers} layers, {report.num_heads} heads"),
        ("calls", f"{report.sparse_calls} sparse, {report.dense_calls} dense"),
        *((f"  sparse in {name}", str(count)) for name, count in report.precisions.items() if name != "native"),
        *((f"  dense: {reason}", str(count)) for reason, count in report.dense_reasons.items()),
        *((f"  not counted: {reason}", _layers(count)) for reason, count in report.unreached_layers.items()),
        ("density of sparse calls", _percent(report.density)),
        ("density of all calls", _percent(report.overall_density)),
        ("head classes", classes),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}".rstrip() for label, text in rows)


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def _percent(share: float | None) -> str:
    return "none yet" if share is None else f"{100 * share:.1f} %"

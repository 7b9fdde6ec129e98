"""The tables that `diffsparse demo` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from diffsparse.eval.comparison import Comparison
from diffsparse.eval.generate import Generation

if TYPE_CHECKING:
    from diffsparse.report import SparseAttentionReport


def time_table(dense: Generation, sparse: Generation) -> Table:
    """Seconds of both, and their ratio."""
    table = _table("Time in seconds", "dense", "sparse", "dense ÷ sparse")
    for label, of_dense, of_sparse in (
        ("per denoising step", dense.seconds_per_step, sparse.seconds_per_step),
        ("all steps", sum(dense.step_seconds), sum(sparse.step_seconds)),
        ("text encoder and VAE", dense.other_seconds, sparse.other_seconds),
        ("in all", dense.total_seconds, sparse.total_seconds),
    ):
        table.add_row(label, f"{of_dense:.2f}", f"{of_sparse:.2f}", f"{of_dense / of_sparse:.2f}×")
    return table


def quality_table(comparison: Comparison) -> Table:
    """How close the sparse video is to the dense one, before either is compressed."""
    table = _table("Sparse video against dense video", "mean", "worst frame")
    for row in comparison.rows():
        table.add_row(*row)
    return table


def attention_table(report: SparseAttentionReport) -> Table:
    """What ran in each transformer: density, head classes, and every dense call with its reason."""
    table = _table("Sparse attention", *(transformer.name for transformer in report.transformers))
    for label, cells in (
        ("density of the sparse calls", [_percent(t.density) for t in report.transformers]),
        ("density of all calls", [_percent(t.overall_density) for t in report.transformers]),
        *_shares(report),
        ("attention calls, sparse", [str(t.sparse_calls) for t in report.transformers]),
        ("attention calls, dense", [str(t.dense_calls) for t in report.transformers]),
        *_reasons(report),
    ):
        table.add_row(label, *cells)
    table.caption = "density: share of key blocks computed exactly"
    return table


def _shares(report: SparseAttentionReport) -> list[tuple[str, list[str]]]:
    shares = [transformer.class_shares for transformer in report.transformers]
    names = dict.fromkeys(name for share in shares for name in share)
    return [(f"heads that are {name}", [_percent(share.get(name, 0.0)) for share in shares]) for name in names]


def _reasons(report: SparseAttentionReport) -> list[tuple[str, list[str]]]:
    reasons = dict.fromkeys(reason for t in report.transformers for reason in t.dense_reasons)
    return [
        (f"  dense: {reason}", [str(t.dense_reasons.get(reason, 0)) for t in report.transformers]) for reason in reasons
    ]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _percent(share: float | None) -> str:
    return "none ran" if share is None else f"{100 * share:.1f} %"

"""The results of `diffsparse bench --suite` as Markdown, for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.eval.bench_suite import PRECISIONS, method_of, precision_of


def as_markdown(record: Mapping[str, Any]) -> str:
    """Tables of a result file: attention, planning and memory, transformers."""
    machine = record["machine"]
    parts = [
        f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, Python {machine['python']}, "
        f"{record['date']}."
    ]
    for name, result in record["attention"].items():
        parts += [f"### {name}", _size(result), _attention(result), _beside(result)]
    if record.get("transformers"):
        parts += ["### Steps of whole transformers", _transformers(record["transformers"])]
    return "\n\n".join(parts) + "\n"


def _size(result: Mapping[str, Any]) -> str:
    return (
        f"{result['tokens']:,} tokens, {result['heads']} heads x {result['head_dim']}, {result['dtype']}; medians of "
        f"rounds in which all took turns; speed-up against the fastest dense attention in that dtype, "
        f"{result['best_dense']}."
    )


def _attention(result: Mapping[str, Any]) -> str:
    lines = [
        "| attention | density | ms | TFLOP/s on exact blocks | speed-up | of linear | error against float64 |",
        "|---|---|---|---|---|---|---|",
    ]
    # The dense ones as they are, then ours by precision, then others' sparse ones, the densest first.
    calls = sorted(result["calls"].items(), key=lambda item: _order(*item))
    for name, call in calls:
        of_linear = f"{call['share_of_linear']:.0%}" if "share_of_linear" in call else ""
        error = f"{call['error']:.1e}" if "error" in call else ""
        lines.append(
            f"| {title_of(name, call)} | {call['density']:.0%} | {call['seconds'] * 1e3:.2f} | "
            f"{call['tflops']:.0f} | {call['speed_up']:.2f}x | {of_linear} | {error} |"
        )
    return "\n".join(lines)


def is_dense(call: Mapping[str, Any]) -> bool:
    """Whether a call lists no blocks; only those that do are checked."""
    return "error" not in call


def title_of(name: str, call: Mapping[str, Any]) -> str:
    """What a call is named in tables and pictures, without its density."""
    if is_dense(call):
        return name
    method = method_of(name)
    return f"ours, {method}" if _is_ours(method) else f"{method}, sparse"


def _order(name: str, call: Mapping[str, Any]) -> tuple[int, str, float]:
    if is_dense(call):
        return 0, "", 0.0
    method = method_of(name)
    return 1 if _is_ours(method) else 2, method, -call["density"]


def _is_ours(method: str) -> bool:
    return precision_of(method) in PRECISIONS


def _beside(result: Mapping[str, Any]) -> str:
    planning = result["planning"]
    text = (
        f"Planning {planning['plan_seconds'] * 1e3:.1f} ms, kept {planning['replan_every']} steps, and permuting "
        f"{planning['permute_seconds'] * 1e3:.1f} ms a call: {planning['share_of_dense']:.1%} of torch's dense call of "
        f"{planning['dense_seconds'] * 1e3:.1f} ms."
    )
    extra: dict[str, float] = {}
    for name, peak in result["extra_bytes"].items():
        if peak is not None:
            kind = title_of(name, result["calls"][name])
            extra[kind] = max(extra.get(kind, 0.0), peak / result["input_bytes"])
    if extra:
        shares = ", ".join(f"{kind} {share:.2f}" for kind, share in extra.items())
        text += f" Peak memory of a call beyond its inputs, output included, in copies of q, k and v: {shares}."
    return text


def _transformers(results: Mapping[str, Any]) -> str:
    lines = [
        "| transformer, random weights | layers measured, of | config | dense, s a step | sparse, s a step | speed-up |"
        " density |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, configs in results.items():
        for config, result in configs.items():
            seconds = result["seconds_per_step"]
            density = "dense" if result["density"] is None else f"{result['density']:.0%}"
            lines.append(
                f"| {name} | {result['layers_measured']} of {result['layers_of_model']} | {config} | "
                f"{seconds['dense']:.3f} | {seconds['sparse']:.3f} | {result['speed_up']:.2f}x | "
                f"{density} |"
            )
    return "\n".join(lines)

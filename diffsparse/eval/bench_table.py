"""The results of `diffsparse bench --suite` as Markdown, for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
    for name, call in result["calls"].items():
        exact = "error" not in call
        of_linear, error = ("", "") if exact else (f"{call['share_of_linear']:.0%}", f"{call['error']:.1e}")
        title = name if exact else f"ours, {name.split()[0]}"
        lines.append(
            f"| {title} | {call['density']:.0%} | {call['seconds'] * 1e3:.2f} | "
            f"{call['tflops']:.0f} | {call['speed_up']:.2f}x | {of_linear} | {error} |"
        )
    return "\n".join(lines)


def _beside(result: Mapping[str, Any]) -> str:
    planning = result["planning"]
    text = (
        f"Planning {planning['plan_seconds'] * 1e3:.1f} ms, kept {planning['replan_every']} steps, and permuting "
        f"{planning['permute_seconds'] * 1e3:.1f} ms a call: {planning['share_of_dense']:.1%} of torch's dense call of "
        f"{planning['dense_seconds'] * 1e3:.1f} ms."
    )
    extra = {name: peak / result["input_bytes"] for name, peak in result["extra_bytes"].items() if peak is not None}
    if extra:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in extra.items())
        text += f" Peak memory beyond the inputs, as a share of q, k and v together: {shares}."
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

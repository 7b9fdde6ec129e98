"""`diffsparse eval ablation`: what the adaptive strategy owes to its parts, on the demo model.

Each fixed rule is the adaptive strategy with a single candidate and the same density in every head and at every step,
so that all run on the same kernel, at the same density, with the same dense steps. Then come its parts: the choice
among all candidates, with it blocks shared among heads, or more of them for the first sparse steps, and both; and all
of it with pooled scores in place of impacts. Videos of the same prompt and seed are compared with the dense one by
PSNR.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from diffsparse.eval import sweep
from diffsparse.eval.sweep_results import SweepResults, Variant
from diffsparse.heads import HeadClass
from diffsparse.strategies.adaptive import CANDIDATES, Adaptive, Candidate

SPATIAL_BAND, TEMPORAL_BAND, *BY_IMPACT = CANDIDATES
BY_MEANS = [replace(candidate, rule="top") for candidate in BY_IMPACT]
EVEN: dict[str, Any] = {"equal_heads": True, "front_load": 0.0}
FIXED_RULES: dict[str, tuple[Candidate, ...]] = {
    "random blocks": (Candidate(HeadClass.TEXTURAL, "frame-major", "random"),),
    "spatial band": (SPATIAL_BAND,),
    "temporal band": (TEMPORAL_BAND,),
    "better of the two bands": (SPATIAL_BAND, TEMPORAL_BAND),
    **{f"top pooled scores, {candidate.order}": (candidate,) for candidate in BY_MEANS},
    **{f"largest impacts, {candidate.order}": (candidate,) for candidate in BY_IMPACT},
}
RULES: dict[str, dict[str, Any]] = {
    **{name: EVEN | {"candidates": candidates} for name, candidates in FIXED_RULES.items()},
    "choice of each head": EVEN,
    "choice, blocks shared among heads": {"front_load": 0.0},
    "choice, more in the first steps": {"equal_heads": True},
    "adaptive by pooled scores": {"candidates": (SPATIAL_BAND, TEMPORAL_BAND, *BY_MEANS)},
    "adaptive": {},
}
"""Options of `Adaptive`, by what they stand for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How much of it, and where the results go."""
    sweep.add_arguments(parser, prompts=8, densities=[0.25, 0.125])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES, metavar="RULE", help="(default: all)")


def run(args: argparse.Namespace) -> int:
    """Make what the file of results does not have yet, keep it there, print the table; or join files into one."""
    strategies = {
        Variant(rule, density, tail): Adaptive(density=density, tail=tail, **RULES[rule])
        for rule in args.rules
        for tail in (False, True)
        for density in args.densities
    }
    results = sweep.carry_out(args, "ablation", lambda sampling, load: (strategies, {}))
    if results is not None:
        print(as_markdown(results))
    return 0


def as_markdown(results: SweepResults) -> str:
    """The mean PSNR of every rule at every density, without and with the tail, of the complete pairs; and LPIPS."""
    parts = [_table(results, "mean PSNR to dense, dB", lambda score: f"{score:.1f}", "psnr_db")]
    if net := results.settings.get("lpips_net"):
        parts.append(_table(results, f"mean LPIPS, {net}", lambda score: f"{score:.3f}", "lpips"))
    return "\n\n".join([*parts, results.coverage()])


def _table(results: SweepResults, title: str, as_text: Callable[[float], str], score: str) -> str:
    pairs, variants = results.complete_pairs(), results.variants
    densities = list(dict.fromkeys(variant.density for variant in variants))
    lines = [
        f"| {title}: dropped / pooled tail | " + " | ".join(f"{100 * d:g} %" for d in densities) + " |",
        "|---" * (len(densities) + 1) + "|",
    ]

    def mean(variant: Variant) -> str:
        # Nobody may have made the videos of one.
        if variant not in variants:
            return "–"
        return as_text(statistics.fmean(getattr(results.scores[pair, variant], score) for pair in pairs))

    for rule in dict.fromkeys(variant.row for variant in variants):
        cells = (" / ".join(mean(Variant(rule, density, tail)) for tail in (False, True)) for density in densities)
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

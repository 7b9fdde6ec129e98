"""Two runs held against each other: on the same prompts and seeds, whose sparse videos are closer to its dense ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from diffsparse.eval.lpips_metric import Lpips, NoLpips
from diffsparse.eval.paired_statistics import of_differences
from diffsparse.eval.report_data import METRICS, Metric, collect, finite_means
from diffsparse.eval.report_tables import metric_labels, number

COMPARED = METRICS | {"speed_up": Metric("speed-up", ".2f", higher_is_better=True)}


def compare_runs(a: Path, b: Path, lpips: Lpips | NoLpips) -> list[dict[str, Any]]:
    """For each config of both runs and each metric: the means over the videos that both have, and B less A.

    Two runs with one config each are compared whatever these are called. Scores that are infinite or missing are left
    out.

    Raises:
        ValueError: a folder that is no run, no config or no video in common.
    """
    data = collect([a, b], lpips)
    of_a, of_b = ([video for video in data["videos"] if video["run"] == run] for run in (0, 1))
    found = []
    for first, second in _configs_of_both(a, b, data):
        for key, metric in COMPARED.items():
            scores_a, scores_b = finite_means(of_a, first, key), finite_means(of_b, second, key)
            both = [video for video in scores_a if video in scores_b]
            if not both:
                continue
            found.append(
                {
                    "config": first if first == second else f"{first}, {second}",
                    "metric": key,
                    "higher_is_better": metric.higher_is_better,
                    "mean_a": math.fsum(scores_a[video] for video in both) / len(both),
                    "mean_b": math.fsum(scores_b[video] for video in both) / len(both),
                    **of_differences([scores_b[video] - scores_a[video] for video in both]),
                }
            )
    if not found:
        missing = data["missing"][:1]
        first = "".join(f" (the first that {(a, b)[video['run']]} lacks: {video['reason']})" for video in missing)
        raise ValueError(
            f"{a} and {b} have no scored video of the same prompt and seed in common{first}. Make some: run "
            "`diffsparse eval run` with the same --prompts and --seeds for both."
        )
    return found


def rows_of_runs(differences: list[dict[str, Any]], lpips_net: str) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each config and metric: under the difference its interval, and p of the sign test."""
    labels = metric_labels(lpips_net) | {"speed_up": COMPARED["speed_up"].label}
    rows = []
    for row in differences:
        digits = COMPARED[row["metric"]].digits
        interval = "" if row["interval"] is None else "\n[{:+{d}}, {:+{d}}]".format(*row["interval"], d=digits)
        better = "neither" if row["mean"] == 0 else "B" if (row["mean"] > 0) == row["higher_is_better"] else "A"
        means = [number(row[mean], digits) for mean in ("mean_a", "mean_b")]
        difference = f"{row['mean']:+{digits}}{interval}"
        end = [better, f"{row['sign_test']:.3f}", str(row["num_pairs"])]
        rows.append([row["config"], labels[row["metric"]], *means, difference, *end])
    return ["config", "metric", "A", "B", "B − A", "better", "p", "videos"], rows


def _configs_of_both(a: Path, b: Path, data: dict[str, Any]) -> list[tuple[str, str]]:
    first, second = (sorted(run["settings"]["configs"]) for run in data["runs"])
    if len(first) == len(second) == 1:
        return [(first[0], second[0])]
    both = [name for name in first if name in second]
    if not both:
        raise ValueError(
            f"{a} and {b} have no config in common: {', '.join(first)} against {', '.join(second)}. "
            "Add one by `diffsparse eval run --config`."
        )
    return [(name, name) for name in both]

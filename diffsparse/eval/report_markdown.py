"""A report as Markdown, to paste where HTML does not go."""

from __future__ import annotations

import re
from typing import Any

from diffsparse.eval.report_data import METRICS
from diffsparse.eval.report_tables import (
    differences,
    headline,
    label,
    metric_labels,
    notes,
    number,
    percent,
    published,
)


def as_markdown(data: dict[str, Any]) -> str:
    """Headline, notes, every video, and what it was made with."""
    headings, rows = headline(data)
    lines = ["# Sparse against dense attention", "", *table(headings, rows + published(data)), ""]
    lines += ["Mean over the videos [95 % interval of the mean], and the worst frame of all.", ""]
    lines += [f"- {_plain(note)}" for note in notes(data)]
    if data["differences"]:
        lines += ["", "## Config against config", "", *table(*differences(data))]
    lines += ["", "## Every video", "", *table(*_videos(data))]
    lines += ["", "## How it was made", ""]
    for run in data["runs"]:
        for made in run["made_by"]:
            machine = "; ".join(f"{key}: {value}" for key, value in made["machine"].items())
            versions = ", ".join(f"{key} {value}" for key, value in made["versions"].items())
            # Indented: nothing inside is Markdown.
            lines += [f"    {_one_line(made['command'])}", ""]
            lines += [_plain(f"{machine}; {versions}; revision {made['git_revision'] or 'unknown'}"), ""]
    return "\n".join(lines).rstrip() + "\n"


def table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    cells = [headings, ["---"] * len(headings), *([_plain(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _videos(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    headings = ["prompt", "seed", "config", *metric_labels(data["lpips_net"]).values(), "speed-up", "density"]
    rows = []
    for video in data["videos"]:
        scores = [video["scores"][key] for key in METRICS]
        cells = ["n/a" if isinstance(s, str) else number(s["mean"], m.digits) for s, m in zip(scores, METRICS.values())]
        end = [number(video["speed_up"], ".2f"), percent(video["overall_density"])]
        name = label(data, video["run"], video["config"])
        rows.append([video["prompt"], str(video["seed"]), name, *cells, *end])
    return headings, rows


def _plain(text: str) -> str:
    """Text in which nothing is Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())

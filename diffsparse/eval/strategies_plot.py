"""PSNR against measured density of every strategy as a picture, and the line of those that no other beats."""

from __future__ import annotations

import math
from pathlib import Path

from diffsparse.eval.pareto_plot import Point, unbeaten
from diffsparse.eval.strategies_table import TableRow, table_rows
from diffsparse.eval.strategy_rows import REFERENCE
from diffsparse.eval.sweep_results import SweepResults
from diffsparse.whole_file import whole_file

MARKERS = "osD^v<>pP*XhHd"


def draw(results: SweepResults, path: Path) -> None:
    """Write the picture as a PNG, whole or not at all. Rows with a video that equals the dense one are left out.

    Raises:
        ValueError: that is all of them.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = [row for row in table_rows(results) if math.isfinite(row.psnr_db)]
    if not rows:
        raise ValueError(f"There is nothing to draw in {path}: every strategy has a video that equals the dense one.")
    names = list(dict.fromkeys(row.variant.row for row in rows))
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    panel = figure.subplots()
    for number, name in enumerate(names):
        colour = "black" if name == REFERENCE else colormaps["tab20"](number % 20)
        its = [row for row in rows if row.variant.row == name]
        tails = sorted({row.variant.tail for row in its})
        for tail in tails:
            line = sorted((100 * row.density, row.psnr_db) for row in its if row.variant.tail == tail)
            panel.plot(
                *zip(*line),
                color=colour,
                marker=MARKERS[number % len(MARKERS)],
                markerfacecolor=colour if tail else "white",
                linestyle="-" if tail else ":",
                linewidth=2.5 if name == REFERENCE else 1,
                label=name if tail == tails[-1] else None,
            )
    unbeaten_points = sorted((100 * row.density, row.psnr_db) for row in front(rows))
    panel.plot(*zip(*unbeaten_points), color="grey", linewidth=6, alpha=0.25, label="no other is sparser and closer")
    panel.set_xlabel("measured density of the sparse calls, %")
    panel.set_ylabel("mean PSNR to dense, dB")
    panel.grid(alpha=0.3)
    title = "filled: with the pooled tail\nhollow, dotted: without"
    figure.legend(loc="outside right upper", title=title, title_fontsize=8, fontsize=8, frameon=False)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png")


def front(rows: list[TableRow]) -> list[TableRow]:
    """The rows than which no other is both at most as dense and at least as close, and better in one."""
    # Densities are means, whose last digits are those of rounding.
    points = [Point(str(number), 1 / round(row.density, 4), row.psnr_db) for number, row in enumerate(rows)]
    return [rows[int(point.label)] for point in unbeaten(points)]

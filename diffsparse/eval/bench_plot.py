"""Speed-up against density as a picture: the results of `diffsparse bench --suite`, a panel for each geometry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffsparse.eval.bench_table import is_dense, title_of
from diffsparse.whole_file import whole_file

COLUMNS = 2


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a result file's attention as a PNG, whole or not at all.

    Every sparse call is a point at its density and its speed-up over the fastest dense one, those of one kind are
    joined; grey is what would be linear, and dense calls are marks at 100 %.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    results = record["attention"]
    titles = list(dict.fromkeys(title_of(*call) for result in results.values() for call in result["calls"].items()))
    # Grey is for what would be linear.
    palette = [colour for colour in map(colormaps["tab20"], range(20)) if len(set(colour[:3])) > 1]
    colours = {title: palette[number % len(palette)] for number, title in enumerate(titles)}
    figure = Figure(figsize=(10, 4.5 * -(-len(results) // COLUMNS)), layout="constrained")
    panels = figure.subplots(-(-len(results) // COLUMNS), COLUMNS, squeeze=False).flat
    # The results first: otherwise zip takes a panel more before it finds them at an end.
    for (name, result), panel in zip(results.items(), panels):
        lines: dict[str, list[tuple[float, float]]] = {}
        for call, row in result["calls"].items():
            point = 100 * row["density"], row["speed_up"]
            if is_dense(row):
                panel.plot(*point, marker="_", markersize=14, color=colours[title_of(call, row)])
            else:
                lines.setdefault(title_of(call, row), []).append(point)
        for title, points in lines.items():
            panel.plot(*zip(*sorted(points)), marker="o", markersize=4, color=colours[title])
        densities = [100 * row["density"] for row in result["calls"].values()]
        linear = sorted({*densities, 100.0})
        panel.plot(linear, [100 / density for density in linear], color="grey", linewidth=6, alpha=0.25)
        panel.set(title=name, xscale="log", yscale="log", xlabel="density, %", ylabel="speed-up over the fastest dense")
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick >= min(densities) * 0.9]
        panel.set_xticks(ticks, [f"{tick}" for tick in ticks], minor=False)
        panel.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in list(panels):
        panel.remove()
    for title in titles:
        figure.axes[0].plot([], [], color=colours[title], marker="o", markersize=4, label=title)
    figure.axes[0].plot([], [], color="grey", linewidth=6, alpha=0.25, label="linear")
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png")

"""A picture of what every head does: its class as a colour, its density as the height of a bar."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsparse.whole_file import whole_file

if TYPE_CHECKING:
    from diffsparse.report import SparseAttentionReport, TransformerReport

# Okabe and Ito's colours, told apart by colour-blind readers too; in grey they differ in brightness.
COLOURS = {
    "spatial": "#0072B2",
    "temporal": "#E69F00",
    "textural": "#009E73",
    "dense": "#8C8C8C",
}
OTHER_COLOUR = "#CC79A7"

MEANINGS = {
    "spatial": "attends within its own and nearby frames",
    "temporal": "attends to its own place through time",
    "textural": "attends wherever the content decides",
    "dense": "was not made sparse",
}

# More heads than this are too narrow for the percentage to be written in.
MOST_HEADS_WITH_TEXT = 16


def draw_head_classes(report: SparseAttentionReport, path: Path) -> None:
    """Write the picture of all transformers of a report as a PNG, whole or not at all.

    Raises:
        ValueError: no transformer of the report has run.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    transformers = [t for t in report.transformers if t.num_layers and t.num_heads]
    if not transformers:
        raise ValueError("There is no head to draw: no transformer of the report has run sparse.")

    # Inches: wide enough for the text in a bar, and for the legend.
    widths = [max(6.0, min(14.0, 1.4 + 0.55 * t.num_heads)) for t in transformers]
    height = max(min(20.0, 0.42 * t.num_layers) for t in transformers)
    figure = Figure(figsize=(sum(widths), height + 2.8), layout="constrained")
    panels = figure.subplots(1, len(transformers), squeeze=False, width_ratios=widths)[0]
    for panel, transformer in zip(panels, transformers):
        _draw_panel(panel, transformer)
    shown = dict.fromkeys(name for t in transformers for layer in t.head_classes for name in layer)
    patches = [
        Patch(color=_colour(name), label=f"{name}: {MEANINGS.get(name, 'no class was chosen')}")
        for name in sorted(shown, key=lambda name: list(COLOURS).index(name) if name in COLOURS else len(COLOURS))
    ]
    figure.suptitle("What each attention head was found to do", fontsize=13)
    figure.legend(
        handles=patches,
        loc="outside lower center",
        frameon=False,
        title="Height of a bar and number in %: density, the share of key blocks computed exactly",
    )
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png")


def _draw_panel(panel: Any, report: TransformerReport) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    outline = [withStroke(linewidth=2.5, foreground="white")]
    backgrounds, bars, colours = [], [], []
    for layer in range(report.num_layers):
        for head in range(report.num_heads):
            density = report.head_densities[layer][head]
            left, bottom, width, height = head + 0.04, layer + 0.96, 0.92, 0.92
            backgrounds.append(Rectangle((left, bottom), width, -height))
            bars.append(Rectangle((left, bottom), width, -height * density))
            colours.append(_colour(report.head_classes[layer][head]))
            if report.num_heads <= MOST_HEADS_WITH_TEXT:
                percent = f"{100 * density:.0f}"
                middle = {"ha": "center", "va": "center", "fontsize": 9, "path_effects": outline}
                panel.text(head + 0.5, layer + 0.5, percent, **middle)
    panel.add_collection(PatchCollection(backgrounds, facecolors=colours, alpha=0.22, linewidths=0))
    panel.add_collection(PatchCollection(bars, facecolors=colours, linewidths=0))
    mean = "" if report.density is None else f", density {100 * report.density:.0f} % in sparse calls"
    title = f"{report.name} ({report.family}){mean}"
    # Half a character, as a damaged record may have, is drawn as JSON's own \u: matplotlib has no glyph for it.
    panel.set_title(title.encode("utf-8", "backslashreplace").decode(), fontsize=10)
    panel.set_xlim(0, report.num_heads)
    # Layer 0 on top, where the video enters.
    panel.set_ylim(report.num_layers, 0)
    _label(panel.xaxis, "head", report.num_heads)
    _label(panel.yaxis, "layer", report.num_layers)
    panel.set_frame_on(False)
    panel.tick_params(length=0)


def _label(axis: Any, name: str, count: int) -> None:
    every = max(1, count // 20)
    axis.set_label_text(name)
    axis.set_ticks([index + 0.5 for index in range(0, count, every)], [str(i) for i in range(0, count, every)])


def _colour(head_class: str) -> str:
    return COLOURS.get(head_class, OTHER_COLOUR)

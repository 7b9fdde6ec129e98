"""The pictures of `diffsparse inspect`: the attention maps of a head, and the measures of all heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffsparse.calibration import OWN_ORDER
from diffsparse.eval.head_picture import COLOURS, OTHER_COLOUR
from diffsparse.eval.inspect_maps import OTHER_ORDER, AttentionMap, MapPair
from diffsparse.whole_file import whole_file

if TYPE_CHECKING:
    from diffsparse.grid import TokenGrid

KEPT, SKIPPED = "#004c8c", "#b34700"
"""The strongest attention that is computed exactly, and that is skipped: blue and orange, told apart by anyone."""
KEPT_PALEST, SKIPPED_PALEST = "#d9e8f5", "#ffffff"
WEAKEST, STRONGEST = 0.5, 50.0
"""Attention of the palest and of the strongest colour, as a multiple of attention spread evenly."""

MEASURES = {
    "density": "density: share of key blocks computed exactly",
    "recall": "recall: share of dense attention that these hold",
    "error": "error: of the output against dense attention",
}


def draw_maps(pair: MapPair, title: str, path: Path) -> None:
    """Write a head's maps before and after its tokens are put in order, side by side, as a PNG, whole or not at all."""
    figure, canvas = _figure(10.6, 6.3)
    figure.suptitle(title, fontsize=11)
    panels = figure.subplot_mosaic([["before", "after"], ["scale", "scale"]], height_ratios=[1, 0.045])
    for when, shown in (("before", pair.before), ("after", pair.after)):
        panel = panels[when]
        height, width = (shown.cell * cells for cells in shown.kept.shape)
        panel.imshow(coloured(shown), interpolation="nearest", extent=(0, width, height, 0))
        panel.set_xlim(0, pair.grid.num_tokens)
        panel.set_ylim(min(height, pair.grid.num_tokens), 0)
        panel.set_title(f"{when}: {order_in_words(shown.order)}", fontsize=10)
        _label_tokens(panel, shown, pair.grid)
    _draw_scale(panels["scale"])
    _save(canvas, path)


def draw_heads(data: dict[str, Any], path: Path) -> None:
    """Write class, density, recall and error of every head, means over the sparse steps, as a PNG, whole or not at all.

    Args:
        data: as of `inspect_data.collect`.
    """
    from matplotlib.patches import Patch

    transformers = [each for each in data["transformers"] if each["num_heads"]]
    layers, heads = (max(each[key] for each in transformers) for key in ("num_layers", "num_heads"))
    width, height = min(5.0, 1.6 + 0.22 * heads), min(9.0, 1.5 + 0.24 * layers)
    figure, canvas = _figure(4 * max(2.9, width), len(transformers) * max(2.6, height) + 0.5)
    rows = figure.subplots(len(transformers), 4, squeeze=False)
    for panels, transformer in zip(rows, transformers):
        grids = _grids(transformer)
        panels[0].imshow(grids["class"], interpolation="nearest", aspect="auto")
        panels[0].set_title(f"{transformer['name']}: class", fontsize=9)
        for panel, (name, meaning) in zip(panels[1:], MEASURES.items()):
            largest = max(1e-9, float(np.nanmax(grids[name], initial=0.0))) if name == "error" else 1.0
            image = panel.imshow(
                grids[name], vmin=0, vmax=largest, cmap="cividis", interpolation="nearest", aspect="auto"
            )
            panel.set_title(meaning.replace(": ", ":\n"), fontsize=9)
            figure.colorbar(image, ax=panel)
        for panel in panels:
            panel.set_xlabel("head")
            panel.set_ylabel("layer")
            panel.locator_params(integer=True)
    names = dict.fromkeys(head["class"] for each in transformers for head in each["heads"])
    patches = [Patch(color=COLOURS.get(name, OTHER_COLOUR), label=name) for name in names]
    figure.legend(handles=patches, loc="outside lower center", frameon=False, ncols=len(patches))
    _save(canvas, path)


def coloured(shown: AttentionMap) -> NDArray[Any]:
    """The colours of a map, [C_q, C, 3] from 0 to 1: blue what is computed exactly, orange what is skipped."""
    level = np.log10(np.maximum(shown.attention, WEAKEST) / WEAKEST) / np.log10(STRONGEST / WEAKEST)
    kept, skipped = (_between(*ends, level) for ends in ((KEPT_PALEST, KEPT), (SKIPPED_PALEST, SKIPPED)))
    # A mean of many may be 1 and a rounding, and matplotlib would complain on the terminal.
    share = shown.kept[..., None].clip(0.0, 1.0)
    colours: NDArray[Any] = share * kept + (1 - share) * skipped
    return colours


def order_in_words(order: str) -> str:
    """The order of a map's tokens, for a title."""
    if order == OWN_ORDER:
        return "tokens in their own order"
    if order == OTHER_ORDER:
        return "tokens in an order of the strategy’s own, such as tiles"
    return f"tokens sorted by {', '.join(order.split())}"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1), dpi=100)
    return figure, FigureCanvasAgg(figure)


def _save(canvas: Any, path: Path) -> None:
    from PIL import Image

    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    # 256 colours are enough for two hues and grey, and take a third of the bytes.
    with whole_file(path) as unfinished:
        image.quantize(256, dither=Image.Dither.NONE).save(unfinished, optimize=True)


def _label_tokens(panel: Any, shown: AttentionMap, grid: TokenGrid) -> None:
    """Name frames where they are in one piece, else count tokens; a line where text begins."""
    panel.tick_params(labelsize=8)
    panel.set_ylabel("query", fontsize=9)
    is_own = shown.order == OWN_ORDER
    first = grid.text_before if is_own else 0
    if is_own or shown.order == "frame height width":
        size = grid.height * grid.width
        every = max(1, -(-grid.frames // 8))
        frames = range(0, grid.frames, every)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_ticks([first + frame * size for frame in frames], [str(frame) for frame in frames])
        panel.set_xlabel("key, by frame", fontsize=9)
    else:
        panel.locator_params(nbins=6)
        panel.set_xlabel("key, by place in this order", fontsize=9)
    for edge in (first, first + grid.num_video_tokens):
        if 0 < edge < grid.num_tokens:
            panel.axhline(edge, color="black", linewidth=0.6)
            panel.axvline(edge, color="black", linewidth=0.6)


def _draw_scale(panel: Any) -> None:
    """Which colour is how much attention, computed above and skipped below."""
    ends = np.log10(WEAKEST), np.log10(STRONGEST)
    attention = np.tile(10 ** np.linspace(*ends, 256), (2, 1))
    kept = np.array([[1.0], [0.0]]) + 0 * attention
    scale = AttentionMap(attention, kept, 1, OTHER_ORDER)
    panel.imshow(coloured(scale), extent=(*ends, 0, 2), aspect="auto", interpolation="nearest")
    ticks = (0.5, 1, 2, 5, 10, 20, 50)
    panel.set_xticks(np.log10(ticks), [f"{tick:g} ×" for tick in ticks])
    panel.set_yticks([1.5, 0.5], ["computed exactly", "skipped"])
    panel.tick_params(labelsize=8)
    panel.set_xlabel("attention, as a multiple of attention spread evenly over all keys", fontsize=9)


def _between(palest: str, strongest: str, level: NDArray[Any]) -> NDArray[Any]:
    from matplotlib.colors import to_rgb

    first, last = np.array(to_rgb(palest)), np.array(to_rgb(strongest))
    colours: NDArray[Any] = first + np.clip(level, 0, 1)[..., None] * (last - first)
    return colours


def _grids(transformer: dict[str, Any]) -> dict[str, Any]:
    """Colours of the classes [L, H, 3] and each measure [L, H] of a transformer's heads."""
    from matplotlib.colors import to_rgb

    shape = transformer["num_layers"], transformer["num_heads"]
    grids: dict[str, Any] = {"class": np.empty((*shape, 3))} | {name: np.empty(shape) for name in MEASURES}
    for head in transformer["heads"]:
        place = head["layer"], head["head"]
        grids["class"][place] = to_rgb(COLOURS.get(head["class"], OTHER_COLOUR))
        for name in MEASURES:
            grids[name][place] = head[name]
    return grids

"""The grid of all heads on the page of `diffsparse inspect`, which its script paints: one measure, at one step."""

from __future__ import annotations

import itertools
from typing import Any

from diffsparse.eval.head_picture import COLOURS, OTHER_COLOUR
from diffsparse.eval.html_page import data_block, text

MEASURES = ("class", "density", "recall", "error")


def heads_grid(data: dict[str, Any]) -> list[str]:
    """Part of a page; nothing where no transformer was called. `data` as in the JSON file."""
    transformers = [each for each in data["transformers"] if each["num_heads"]]
    if not transformers:
        return []
    num_steps = data["sampling"]["num_inference_steps"]
    buttons = "".join(f'<button data-measure="{name}">{name}</button>' for name in MEASURES)
    contents = {
        "steps": num_steps,
        "colours": COLOURS | {"other": OTHER_COLOUR},
        "transformers": [_compact(each) for each in transformers],
    }
    grids = itertools.chain.from_iterable(_grid(index, each) for index, each in enumerate(transformers))
    return [
        "<h2>Every head</h2>",
        "<noscript><p>The coloured grid, the choice of steps and the sorting of the table need JavaScript; the means "
        "over the steps are in the table, too.</p></noscript>",
        '<div class="player" id="every-head">',
        f"<div>{buttons}</div>",
        f'<div><input type="range" data-role="step" aria-label="step" min="-1" max="{num_steps - 1}" value="-1">'
        '<strong data-role="step-name"></strong></div>',
        '<p class="dim" data-role="legend"></p>',
        '<div class="beside"><div>',
        *grids,
        "</div><div>",
        '<p data-role="about"></p>',
        '<svg data-role="curve" class="curve" viewBox="0 0 640 190" role="img" aria-label="over the steps"></svg>',
        '<p class="dim">A click on a head shows how it changes over the steps.</p>',
        "</div></div></div>",
        data_block("measures", contents),
    ]


def _grid(index: int, transformer: dict[str, Any]) -> list[str]:
    heads = range(transformer["num_heads"])
    many = " many" if len(heads) > 16 else ""
    rows = [
        f"<tr><th>{layer}</th>"
        + "".join(
            f'<td><button data-transformer="{index}" data-layer="{layer}" data-head="{head}" '
            f'aria-label="layer {layer}, head {head}"></button></td>'
            for head in heads
        )
        + "</tr>"
        for layer in range(transformer["num_layers"])
    ]
    return [
        f'<div class="scroll"><table class="heads{many}"><caption>{text(transformer["name"])}: layers down, heads '
        "across</caption>",
        f"<thead><tr><th></th>{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead><tbody>",
        *rows,
        "</tbody></table></div>",
    ]


def _compact(transformer: dict[str, Any]) -> dict[str, Any]:
    """What the page's script needs of a transformer: [class, density, recall, error] of every head."""

    def four(head: dict[str, Any]) -> list[Any]:
        return [head["class"], *(round(head[name], 5) for name in MEASURES[1:])]

    return {
        "name": transformer["name"],
        "heads": transformer["num_heads"],
        "means": [four(head) for head in transformer["heads"]],
        "steps": [
            {
                "dense": dict.fromkeys(layer["dense"] for layer in step["layers"] if layer["dense"]),
                "heads": [four(head) for layer in step["layers"] for head in layer["heads"]],
            }
            for step in transformer["steps"]
        ],
    }

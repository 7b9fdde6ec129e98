"""The head classes of a report as an image: a row for each layer, a cell for each head."""

from __future__ import annotations

import torch
from torch import Tensor

from diffsparse.report import SparseAttentionReport, TransformerReport

COLOURS = {
    "spatial": (0.0, 0.447, 0.698),
    "temporal": (0.902, 0.624, 0.0),
    "textural": (0.0, 0.62, 0.451),
    "dense": (0.55, 0.55, 0.55),
}
"""Okabe and Ito's, told apart by colour-blind readers too: blue, orange, green, grey."""

OTHER = (0.8, 0.475, 0.655)
LEGEND = (
    "Picture: a row for each block, a cell for each head, filled up to its density. "
    "Blue: spatial, orange: temporal, green: textural, grey: dense."
)
CELL, GAP = 24, 2


def draw_heads(report: SparseAttentionReport | None) -> Tensor:
    """The picture, [1, height, width, 3] in 0 to 1 as ComfyUI's images are; grey where there is no head to draw.

    The part of a cell that is in full colour, from its foot, is the head's density.
    """
    drawn = [] if report is None else [_draw(t) for t in report.transformers if t.num_layers and t.num_heads]
    if not drawn:
        return torch.full((1, CELL, CELL, 3), 0.5)
    height = max(image.shape[0] for image in drawn)
    padded = [torch.nn.functional.pad(image, (0, 0, 0, 0, 0, height - image.shape[0]), value=1.0) for image in drawn]
    return torch.cat(padded, 1)[None]


def _draw(report: TransformerReport) -> Tensor:
    image = torch.ones(report.num_layers * CELL, report.num_heads * CELL, 3)
    for layer, (classes, densities) in enumerate(zip(report.head_classes, report.head_densities)):
        for head, (name, density) in enumerate(zip(classes, densities)):
            cell = image[layer * CELL : (layer + 1) * CELL - GAP, head * CELL : (head + 1) * CELL - GAP]
            colour = torch.tensor(COLOURS.get(name, OTHER))
            cell[:] = 0.75 + 0.25 * colour
            cell[round((1 - density) * cell.shape[0]) :] = colour
    return image

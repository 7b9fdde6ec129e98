from __future__ import annotations

import torch

from diffsparse.comfy.heads_image import CELL, COLOURS, draw_heads
from diffsparse.report import SparseAttentionReport, TransformerReport


def report(classes, densities):
    transformer = TransformerReport("wan", "wan", len(classes), len(classes[0]), 1, 0, {}, 0.5, 0.5, classes, densities)
    return SparseAttentionReport((transformer,))


def test_a_cell_has_the_colour_of_its_class_up_to_its_density():
    image = draw_heads(report([["spatial", "dense"], ["textural", "unclassed"]], [[0.5, 1.0], [0.0, 1.0]]))
    assert image.shape == (1, 2 * CELL, 2 * CELL, 3)
    assert 0 <= image.min() <= image.max() <= 1
    foot, head = image[0, CELL - 5, 2], image[0, 1, 2]
    assert torch.equal(foot, torch.tensor(COLOURS["spatial"]))
    assert (head > foot).all()
    assert torch.equal(image[0, 1, CELL + 2], torch.tensor(COLOURS["dense"]))
    assert not torch.equal(image[0, 2 * CELL - 5, 2], torch.tensor(COLOURS["textural"]))


def test_there_is_a_picture_even_where_nothing_ran():
    assert draw_heads(None).shape == draw_heads(SparseAttentionReport(())).shape == (1, CELL, CELL, 3)


def test_transformers_of_different_depth_stand_side_by_side():
    one, other = report([["spatial"]], [[1.0]]), report([["dense"], ["dense"]], [[1.0], [1.0]])
    both = SparseAttentionReport((*one.transformers, *other.transformers))
    assert draw_heads(both).shape == (1, 2 * CELL, 2 * CELL, 3)

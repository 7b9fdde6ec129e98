from __future__ import annotations

import itertools
import math

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from diffsparse.eval.strategies_plot import draw, front
from diffsparse.eval.strategies_table import table_rows
from diffsparse.eval.strategy_rows import ROWS
from diffsparse.eval.sweep_results import Pair, Score, SweepResults, Variant


def results_of(points, tails=(True,)):
    """Results of one prompt from PSNR and measured density by row."""
    dial = {"option": "density", "value": "0.1", "position": 0.1, "density": 0.2, "error": 0.4, "error_with_tail": 0.3}
    results = SweepResults({"dials": {row: {"0.2": dial} for row in points}})
    for (row, (psnr, density)), tail in itertools.product(points.items(), tails):
        results.scores[Pair("a", 0), Variant(row, 0.2, tail)] = Score(psnr, 0.9, density, 1.0, 2.0)
    return results


def test_the_front_has_what_no_other_is_sparser_and_closer_than():
    points = {"sparse": (20.0, 0.1), "worse": (19.0, 0.15), "close": (30.0, 0.3), "as dense": (29.0, 0.3 - 1e-9)}
    assert {row.variant.row for row in front(table_rows(results_of(points)))} == {"sparse", "close"}


def test_the_picture_is_one_and_differs_with_the_points(tmp_path):
    pictures = []
    for psnr in (20.0, 30.0):
        draw(results_of({"Adaptive": (25.0, 0.2), "other": (psnr, 0.2), "equal": (math.inf, 1.0)}), tmp_path / "p.png")
        pictures.append(matplotlib.image.imread(tmp_path / "p.png"))
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0] != pictures[1]).any()


def test_the_legend_names_every_row_once_and_fits_into_the_picture(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    names = [row.name for row in ROWS]
    for tails in ((True,), (False, True)):
        draw(results_of({name: (20.0 + place, 0.2) for place, name in enumerate(names)}, tails), tmp_path / "p.png")
        (legend,) = figures[-1].legends
        assert sorted(text.get_text() for text in legend.get_texts()[:-1]) == sorted(names)
        corners = legend.get_window_extent().get_points()
        assert all(figures[-1].bbox.contains(*corner) for corner in corners)


def test_without_a_point_there_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(results_of({"equal": (math.inf, 1.0)}), tmp_path / "p.png")
    assert not list(tmp_path.iterdir())

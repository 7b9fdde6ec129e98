from __future__ import annotations

import imageio.v3
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from diffsparse import SparseAttentionReport, TransformerReport
from diffsparse.eval.head_picture import COLOURS, OTHER_COLOUR, draw_head_classes


def transformer(classes, densities, name="transformer"):
    return TransformerReport(
        name=name,
        family="wan",
        num_layers=len(classes),
        num_heads=len(classes[0]) if classes else 0,
        sparse_calls=3,
        dense_calls=1,
        dense_reasons={"early step": 1},
        density=0.25,
        overall_density=0.4,
        head_classes=classes,
        head_densities=densities,
    )


def uniform(name, layers=3, heads=4, density=0.5):
    return transformer([[name] * heads] * layers, [[density] * heads] * layers)


def picture(report, tmp_path):
    draw_head_classes(report, tmp_path / "heads.png")
    assert [file.name for file in tmp_path.iterdir()] == ["heads.png"]
    return imageio.v3.imread(tmp_path / "heads.png")[..., :3]


def pixels_of(colour, image):
    wanted = np.round(255 * np.array(to_rgb(colour)))
    return int((np.abs(image - wanted).max(axis=-1) <= 1).sum())


@pytest.mark.parametrize("name", COLOURS)
def test_a_class_is_drawn_in_its_colour_and_no_other(name, tmp_path):
    image = picture(SparseAttentionReport((uniform(name),)), tmp_path)
    counts = {other: pixels_of(colour, image) for other, colour in COLOURS.items()}
    assert counts.pop(name) > 1000
    # Grey is in the edges of letters too.
    counts.pop("dense", None)
    assert max(counts.values()) < 20


def test_an_unknown_class_is_drawn_too(tmp_path):
    image = picture(SparseAttentionReport((uniform("unclassed"),)), tmp_path)
    assert pixels_of(OTHER_COLOUR, image) > 1000


def test_a_name_with_half_a_character_is_drawn_all_the_same(tmp_path):
    report = transformer([["spatial"] * 4] * 3, [[0.5] * 4] * 3, name="\ud800")
    assert pixels_of(COLOURS["spatial"], picture(SparseAttentionReport((report,)), tmp_path)) > 1000


def test_bars_are_as_high_as_the_density(tmp_path):
    def inked(density):
        # Heads so many that no number covers the bars.
        report = SparseAttentionReport((uniform("spatial", heads=20, density=density),))
        return pixels_of(COLOURS["spatial"], picture(report, tmp_path))

    legend = inked(0.0)
    quarter, half, full = (inked(density) - legend for density in (0.25, 0.5, 1.0))
    # Edges of bars fall between pixels.
    assert quarter / full == pytest.approx(0.25, abs=0.05)
    assert half / full == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (30, 12), (60, 40)])
def test_any_number_of_heads_fits_on_a_screen_and_the_colours_differ(layers, heads, tmp_path):
    random = np.random.default_rng(0)
    classes = random.choice(list(COLOURS), (layers, heads)).tolist()
    report = SparseAttentionReport((transformer(classes, random.random((layers, heads)).tolist()),))
    height, width = picture(report, tmp_path).shape[:2]
    assert 200 < height < 2500
    assert 400 < width < 2500


def test_both_transformers_of_a_pipeline_are_drawn(tmp_path):
    report = SparseAttentionReport((uniform("spatial"), uniform("temporal")))
    image = picture(report, tmp_path)
    middle = image.shape[1] // 2
    above_legend = image[: image.shape[0] // 2]
    assert pixels_of(COLOURS["spatial"], above_legend[:, :middle]) > 500
    assert pixels_of(COLOURS["temporal"], above_legend[:, middle:]) > 500


def test_nothing_to_draw_is_an_error_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="no head to draw"):
        draw_head_classes(SparseAttentionReport((transformer([], []),)), tmp_path / "heads.png")
    assert not list(tmp_path.iterdir())

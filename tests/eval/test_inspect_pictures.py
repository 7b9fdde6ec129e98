from __future__ import annotations

import imageio.v3
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from diffsparse.eval.inspect_maps import AttentionMap, MapPair
from diffsparse.eval.inspect_pictures import (
    KEPT,
    KEPT_PALEST,
    SKIPPED,
    SKIPPED_PALEST,
    STRONGEST,
    WEAKEST,
    coloured,
    draw_heads,
    draw_maps,
    order_in_words,
)
from diffsparse.grid import TokenGrid


def map_of(attention, kept, order="own"):
    return AttentionMap(np.array(attention, np.float32), np.array(kept, np.float32), 32, order)


def test_colours_say_how_much_attention_there_is_and_whether_it_is_kept():
    shown = coloured(map_of([[STRONGEST, STRONGEST], [WEAKEST, 0]], [[1, 0], [1, 0]]))
    for place, colour in (((0, 0), KEPT), ((0, 1), SKIPPED), ((1, 0), KEPT_PALEST), ((1, 1), SKIPPED_PALEST)):
        assert shown[place] == pytest.approx(to_rgb(colour), abs=1e-6)
    darker = coloured(map_of([[0.6, 1, 5, 40]], [[1, 1, 1, 1]])).sum(-1)[0]
    assert (np.diff(darker) < 0).all()


def test_no_colour_is_beyond_what_can_be_shown():
    for share in (np.nextafter(np.float32(1), np.float32(2)), -1e-7):
        colours = coloured(map_of([[0.0, STRONGEST]], [[share, share]]))
        assert colours.min() >= 0
        assert colours.max() <= 1


def test_a_picture_shows_both_maps(tmp_path):
    """All of the left one is skipped, half of the right one is computed."""
    strong = np.full((8, 8), STRONGEST)
    left, right = np.zeros((8, 8)), np.zeros((8, 8))
    right[:, :4] = 1
    pair = MapPair(map_of(strong, left), map_of(strong, right, "height width frame"), TokenGrid(4, 8, 8))
    draw_maps(pair, "a title <b>", tmp_path / "map.png")
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]
    image = imageio.v3.imread(tmp_path / "map.png")[..., :3].astype(int)
    height, width = image.shape[:2]
    assert height < 800
    assert width < 1300

    def share(colour, part):
        near = np.abs(part - 255 * np.array(to_rgb(colour))).max(-1) < 12
        return near.mean()

    above_scale = image[: int(0.85 * height)]
    left_half, right_half = above_scale[:, : int(0.46 * width)], above_scale[:, int(0.54 * width) :]
    assert share(SKIPPED, left_half) > 0.4
    assert share(KEPT, left_half) < 0.01
    assert share(KEPT, right_half) == pytest.approx(share(SKIPPED, right_half), rel=0.05)
    assert share(KEPT, right_half) > 0.2


def test_a_map_of_fewer_queries_is_as_much_lower(tmp_path):
    shown = map_of(np.full((4, 8), STRONGEST), np.zeros((4, 8)))
    draw_maps(MapPair(shown, shown, TokenGrid(1, 8, 16, text_after=128)), "a title", tmp_path / "map.png")
    image = imageio.v3.imread(tmp_path / "map.png")[..., :3].astype(int)
    image = image[: int(0.8 * len(image)), : int(0.54 * image.shape[1])]
    rows, columns = (np.abs(image - 255 * np.array(to_rgb(SKIPPED))).max(-1) < 12).nonzero()
    assert np.ptp(columns) / np.ptp(rows) == pytest.approx(8 / 4, rel=0.02)


def test_orders_are_said_in_words():
    assert order_in_words("own") == "tokens in their own order"
    assert order_in_words("height width frame") == "tokens sorted by height, width, frame"
    assert "strategy" in order_in_words("other")


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (40, 40)])
def test_all_heads_fit_on_a_screen(tmp_path, layers, heads):
    numbers = {"class": "spatial", "density": 0.25, "recall": 0.5, "error": 0.1}
    listed = [{"layer": layer, "head": head, **numbers} for layer in range(layers) for head in range(heads)]
    transformer = {"name": "transformer", "num_layers": layers, "num_heads": heads, "heads": listed}
    never_called = {"name": "transformer_2", "num_layers": layers, "num_heads": 0, "heads": []}
    draw_heads({"transformers": [transformer, never_called]}, tmp_path / "heads.png")
    height, width = imageio.v3.imread(tmp_path / "heads.png").shape[:2]
    assert height < 1200
    assert width < 2100

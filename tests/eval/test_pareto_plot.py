from __future__ import annotations

from xml.etree import ElementTree

import pytest

from diffsparse.eval.pareto_plot import HEIGHT, WIDTH, Point, pareto_svg, unbeaten

POINTS = [Point("fast", 2.0, 20.0, (18.0, 22.0)), Point("middle", 1.5, 19.0), Point("slow", 1.2, 30.0, (29.0, 31.0))]


def places(svg, name):
    return [
        (float(e.get("cx")), float(e.get("cy")))
        for e in ElementTree.fromstring(svg).iter("circle")
        if e.get("class") == name
    ]


def test_a_point_stays_unless_another_is_as_fast_and_as_close_and_better_in_one():
    assert [point.label for point in unbeaten(POINTS)] == ["fast", "slow"]
    twins = [Point("a", 1.5, 20.0), Point("b", 1.5, 20.0)]
    assert unbeaten(twins) == twins
    assert unbeaten([*twins, Point("c", 1.5, 21.0)]) == [Point("c", 1.5, 21.0)]


def test_faster_is_further_right_and_closer_further_up_all_inside():
    (fast_x, fast_y), (middle_x, middle_y), (slow_x, slow_y) = places(pareto_svg(POINTS), "point")
    assert slow_x < middle_x < fast_x < WIDTH
    assert 0 < slow_y < fast_y < middle_y < HEIGHT


@pytest.mark.parametrize("points", [POINTS[:1], [Point("one", 1.0, 30.0)], [Point("slower", 0.4, 3.0)] * 2])
def test_few_or_equal_points_have_a_place_too(points):
    assert len(places(pareto_svg(points), "point")) == len(points)


def test_labels_are_only_text():
    svg = pareto_svg([Point("</svg><script>", 1.0, 20.0)])
    assert [e.tag for e in ElementTree.fromstring(svg).iter() if e.tag == "script"] == []

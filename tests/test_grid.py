from __future__ import annotations

import pytest

from diffsparse.grid import TokenGrid


def test_counts_tokens():
    grid = TokenGrid(3, 5, 7, text_before=2, text_after=4)
    assert grid.num_video_tokens == 105
    assert grid.num_tokens == 111


@pytest.mark.parametrize(
    ("sizes", "name"),
    [((0, 5, 7), "frames"), ((3, -1, 7), "height"), ((3, 5, 7.0), "width"), ((3, 5, True), "width")],
)
def test_refuses_sizes_that_are_no_counts(sizes, name):
    with pytest.raises(ValueError, match=f"`{name}`.*at least 1"):
        TokenGrid(*sizes)


def test_refuses_negative_text():
    with pytest.raises(ValueError, match=r"`text_after`.*at least 0, got -1"):
        TokenGrid(3, 5, 7, text_after=-1)

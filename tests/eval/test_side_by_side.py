from __future__ import annotations

import numpy as np
import pytest

from diffsparse.eval.side_by_side import BACKGROUND, side_by_side
from diffsparse.eval.video_io import read_frames, write_video


def noise(frames=2, height=20, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def holds(canvas, video, factor):
    """The columns at which the enlarged video lies in the canvas, at its lower edge."""
    height, width = video.shape[1] * factor, video.shape[2] * factor
    expected = np.kron(video, np.ones((1, factor, factor, 1), dtype=np.uint8))
    for top in (canvas.shape[1] - height, canvas.shape[1] - height - 1):
        for left in range(canvas.shape[2] - width + 1):
            if np.array_equal(canvas[:, top : top + height, left : left + width], expected):
                return range(left, left + width)
    return None


@pytest.mark.parametrize(("size", "factor"), [((20, 32), 10), ((30, 100), 4), ((40, 400), 1)])
def test_both_videos_are_there_pixel_by_pixel_left_and_right(size, factor):
    left, right = noise(1, *size, seed=1), noise(1, *size, seed=2)
    canvas = side_by_side(left, right, ("a", "b"))
    at_left, at_right = holds(canvas, left, factor), holds(canvas, right, factor)
    assert at_left is not None
    assert at_right is not None
    assert at_left.stop <= at_right.start


@pytest.mark.parametrize("size", [(21, 33), (7, 321), (64, 64)])
def test_any_size_can_be_written_as_a_video(tmp_path, size):
    canvas = side_by_side(noise(2, *size), noise(2, *size), ("dense", "sparse"), ("every token", "some"))
    write_video(tmp_path / "pair.mp4", canvas, fps=4)
    assert next(read_frames(tmp_path / "pair.mp4")).shape == canvas.shape[1:]


def test_floats_and_bytes_give_the_same_picture():
    video = noise()
    titles = ("a", "b")
    assert np.array_equal(
        side_by_side(video, video, titles), side_by_side(video / np.float32(255), video / np.float32(255), titles)
    )


def inked_columns(*args, **kwargs):
    """Columns of the strip above the panes in which something is written."""
    video = np.zeros((1, 320, 320, 3), dtype=np.uint8)
    canvas = side_by_side(video, video, *args, **kwargs)[0]
    return np.flatnonzero((canvas[:-320] != BACKGROUND).any(axis=(0, 2)))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\x85"])
def test_a_heading_of_two_lines_stands_on_one(end):
    video = noise()
    one, two = (side_by_side(video, video, ("a", "b"), heading=f"a red{space}circle") for space in (" ", end))
    assert np.array_equal(one, two)


def test_titles_are_drawn_over_their_own_pane_however_long():
    middle = 320
    assert inked_columns(("", "")).size == 0
    assert 0 < inked_columns(("a rather long title " * 2, "")).max() < middle
    assert inked_columns(("", "a rather long title " * 2)).min() > middle
    assert inked_columns(("", ""), ("", "a rather long subtitle " * 2)).min() > middle


def test_the_heading_spans_both_panes_and_stays_within():
    columns = inked_columns(("", ""), heading="a prompt of quite some length, × and 好 included, " * 3)
    assert columns.min() < 20
    assert 320 < columns.max() < 640


def test_videos_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        side_by_side(noise(2), noise(3), ("a", "b"))

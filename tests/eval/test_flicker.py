from __future__ import annotations

import numpy as np
import pytest

from diffsparse.eval.flicker import Flicker


def noise(frames=7, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, 5, 6, 3), dtype=np.uint8)


def test_it_is_the_mean_difference_of_the_changes_from_frame_to_frame():
    a, b = noise(seed=0), noise(seed=1)
    expected = []
    for t in range(len(a) - 1):
        change_a = a[t + 1].astype(float) / 255 - a[t].astype(float) / 255
        change_b = b[t + 1].astype(float) / 255 - b[t].astype(float) / 255
        expected.append(abs(change_a - change_b).mean())
    # Values are float32: half a unit in the last place of 1 at each of four.
    assert Flicker()(a, b) == pytest.approx(expected, abs=4 * 2**-25)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_windows_give_what_the_whole_gives(window):
    a, b = noise(seed=0), noise(seed=1)
    flicker = Flicker()
    scores = [score for i in range(0, 7, window) for score in flicker(a[i : i + window], b[i : i + window])]
    assert scores == Flicker()(a, b)


def test_a_video_that_looks_different_but_changes_alike_does_not_flicker():
    a = noise() // 2
    assert Flicker()(a, a + 100) == pytest.approx([0] * 6, abs=4 * 2**-25)


def test_one_frame_has_no_flicker_yet():
    assert Flicker()(noise(1), noise(1)) == []


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        Flicker()(noise(3), noise(2))

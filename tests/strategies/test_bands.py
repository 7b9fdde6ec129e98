from __future__ import annotations

import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.permutation import axis_order
from diffsparse.strategies.bands import band, band_with_first_frame_moved, half_width

NAN = float("nan")


@pytest.mark.parametrize("density", [0.1, 0.36, 0.9, 1.0])
def test_a_band_of_the_half_width_keeps_the_density(density):
    places = torch.arange(500)
    kept = (places[:, None] - places).abs() <= half_width(density, 500)
    # A band ends between two tokens, on either side.
    assert kept.float().mean().item() == pytest.approx(density, abs=2 / 500)


def test_what_is_not_positive_has_no_width():
    assert half_width(-0.3, 500) == half_width(0.0, 500) == 0.0


@pytest.mark.parametrize("sizes", [(16, 16), (8, 16), (16, 8)])
def test_a_band_in_blocks_keeps_what_the_band_of_tokens_keeps(sizes):
    places, width = torch.arange(512), 150.0
    tokens = ((places[:, None] - places).abs() <= width).float().mean().item()
    assert band(places, places, width, *sizes).float().mean().item() == pytest.approx(tokens, abs=16 / 512)


def test_positions_that_are_not_numbers_count_for_nothing():
    positions = torch.tensor([0.0, 2.0, NAN, 4.0, NAN, NAN, 9.0])
    # Blocks of 2 stand at 1, 4, nowhere and 9.
    expected = [[True, True, False, False], [True, True, False, True], [False] * 4, [False, True, False, True]]
    assert band(positions, positions, 5.0, 2, 2).tolist() == expected


def test_the_first_frame_keeps_its_position_in_the_band():
    grid, size = TokenGrid(6, 4, 4, text_after=3), 4
    order = axis_order(grid, ("frame", "height", "width"))
    moved, near = band_with_first_frame_moved(grid, order, 17.0, size, size)
    assert moved.tolist() == [*range(16, 96), *range(16), 96, 97, 98]
    # Blocks are whole here, and the token at a block's beginning tells where it stands.
    starts = moved[:96:size]
    assert torch.equal(near[:24, :24], (starts[:, None] - starts).abs() <= 17)


def test_a_block_of_two_frames_sees_what_both_would_see():
    grid = TokenGrid(5, 3, 3)  # 36 tokens before the first frame: a block of 8 is cut after 4
    order = axis_order(grid, ("frame", "height", "width"))
    moved, near = band_with_first_frame_moved(grid, order, 8.0, 8, 8)
    seen = [moved[block * 8 : block * 8 + 8].tolist() for block in near[4].nonzero()[:, 0].tolist()]
    # Beside its tokens 41 to 44 of the last frame, and beside its tokens 0 to 3 of the first.
    assert seen == [[*range(33, 41)], [*range(4, 9)]]


def test_a_block_of_tokens_far_apart_sees_what_the_outermost_would():
    queries, keys = torch.tensor([0.0, 30.0, 60.0, 90.0]), torch.arange(100)
    seen = band(queries, keys, 6.0, 4, 1)
    # The outermost at 0 and 90, each with its 6 to either side, less half a block of queries.
    assert seen[0].nonzero()[:, 0].tolist() == list(range(95))

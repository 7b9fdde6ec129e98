from __future__ import annotations

import functools
import itertools

import pytest
import torch
from plain_rules import always, blocks_of, order_of, random_qkv, visible_of

from diffsparse import Radial
from diffsparse.grid import TokenGrid
from diffsparse.strategies.strategy import AttentionCall


def sees(i: int, k: int, j: int, l: int, length: int, options: Radial) -> bool:
    """Whether the query at place k of frame i sees the key at place l of frame j: the released code's rule."""
    distance = abs(i - j)
    if distance <= 1 or (options.first_frame and j == 0):
        return True
    block = max(options.query_block_size, options.key_block_size)
    base = 2 ** length.bit_length() / 2 ** distance.bit_length()
    every = 1 if base >= block else int(block / base)
    return distance % every == 0 and abs(k - l) <= max(base * options.decay, block)


def shrunk(mask: torch.Tensor) -> bool:
    """Whether a block pair with this mask of tokens is computed."""
    column = mask.float().mean(0)
    return bool((column > 0).any() and (column > 1 / 3).sum() / (column > 0).sum() > 0.6)


@pytest.mark.parametrize("grid", [TokenGrid(9, 5, 7, 2, 9), TokenGrid(9, 4, 8), TokenGrid(2, 3, 3)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        Radial(decay=0.8, query_block_size=8, key_block_size=8),
        Radial(decay=0.2, first_frame=False, query_block_size=16, key_block_size=8),
    ],
)
def test_blocks_follow_from_the_mask_of_tokens(grid, options):
    plan = options.plan(*random_qkv(grid), AttentionCall(grid))
    order, length = order_of(plan, grid), grid.height * grid.width
    place = [divmod(token, length) for token in range(grid.num_video_tokens)]
    mask = torch.zeros(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    for query, (i, k) in enumerate(place):
        for key, (j, l) in enumerate(place):
            mask[query, key] = sees(i, k, j, l, length, options)
    sizes = options.query_block_size, options.key_block_size
    wanted = always(*(blocks_of(order, size) for size in sizes), grid)
    for row, band in enumerate(mask[: grid.num_video_tokens].split(sizes[0])):
        for column, part in enumerate(band.split(sizes[1], dim=1)):
            wanted[row][column] |= shrunk(part)
    assert visible_of(plan) == wanted


@functools.cache
def width_of_band(distance: int, to_first_frame: bool, length: int, options: Radial) -> int:
    """How far the last query of a frame sees back in another one, -1 if it sees nothing of it."""
    frames = (distance, 0) if to_first_frame else (1, 1 + distance)
    return sum(sees(frames[0], length - 1, frames[1], l, length, options) for l in range(length)) - 1


@pytest.mark.parametrize(
    ("frames", "height", "decay", "first_frame", "density"),
    [(18, 48, 0.2, True, 0.269), (30, 48, 0.95, False, 0.259), (21, 45, 0.2, True, 0.245)],
)
def test_the_density_is_that_of_published_settings(frames, height, decay, first_frame, density):
    """768p of Wan 2.1 and of HunyuanVideo, 720p of Wan 2.1."""
    grid, block = TokenGrid(frames, height, 80), 128
    length = height * 80
    options = Radial(decay=decay, first_frame=first_frame)
    pairs, bands = 0, 0
    for i, j in itertools.product(range(frames), repeat=2):
        # The last query of a frame sees its own place and as many before it as its band is wide.
        width = width_of_band(abs(i - j), j == 0, length, options)
        pairs += length**2 - (length - width) * (length - width - 1) if width >= 0 else 0
        bands += 0 <= width < length - 1
    assert pairs / grid.num_tokens**2 == pytest.approx(density, abs=5e-4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    query = torch.zeros(1, 1, 1, 8).expand(-1, -1, grid.num_tokens, -1)
    executed = float(options.plan(query, query, query, AttentionCall(grid)).mask.density)
    torch.set_num_threads(threads)
    # A band ends within a block; both its ends may move by one.
    assert abs(executed - density) < 2 * block * length * bands / grid.num_tokens**2


def test_options_are_checked():
    with pytest.raises(ValueError, match="`first_frame` must be True or False, got 1"):
        Radial(first_frame=1)
    with pytest.raises(ValueError, match="`decay` must be a number from 0 to 100, got -1"):
        Radial(decay=-1)

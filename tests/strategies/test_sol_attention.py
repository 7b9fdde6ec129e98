from __future__ import annotations

import math

import pytest
import torch
from plain_rules import always, blocks_of, frame_major, maps_of_the_video, order_of, random_qkv, visible_of

from diffsparse import SolAttention
from diffsparse.grid import TokenGrid
from diffsparse.strategies.strategy import AttentionCall

GRIDS = [TokenGrid(3, 5, 7), TokenGrid(3, 5, 7, 2, 9)]
CALL = AttentionCall(TokenGrid(4, 8, 8))


@pytest.mark.parametrize("query_size", [16, 8])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_above_the_threshold_of_their_row_are_seen_and_the_neighbours(grid, query_size):
    query, key, value = (x * scale for x, scale in zip(random_qkv(grid), (4, 4, 1)))
    plan = SolAttention(tau=0.7, query_block_size=query_size, key_block_size=8).plan(
        query, key, value, AttentionCall(grid)
    )
    assert order_of(plan, grid) == frame_major(grid)
    queries, keys = blocks_of(frame_major(grid), query_size), blocks_of(frame_major(grid), 8)
    exact = always(queries, keys, grid)
    for head in range(3):
        means = torch.stack([key[0, head, block].mean(0) for block in keys])
        centred = means - means.mean(0)
        wanted = []
        for number, block in enumerate(queries):
            mean = query[0, head, block].mean(0)
            deviation = float((mean**2 * centred.var(0, unbiased=False)).sum().sqrt()) * 24**-0.5
            seen = [float(mean @ one) * 24**-0.5 > 0.7 * deviation for one in centred]
            own = [place for place, one in enumerate(keys) if set(one) & set(block)]
            near = {place + step for place in own for step in (-1, 0, 1)}
            wanted.append([a or b or place in near for place, (a, b) in enumerate(zip(seen, exact[number]))])
        assert visible_of(plan, head=head) == wanted
        assert 0.2 < float(torch.tensor(wanted).float().mean()) < 0.95


def test_the_deviation_has_the_floor_of_the_released_operator():
    """Keys that hardly differ from one another are not above a threshold of next to nothing."""
    query, key, value = random_qkv(CALL.grid)
    # One block of keys scores 1.1 floors above the mean of all, which it moves by a sixteenth of that.
    floor = math.sqrt(1e-6) / math.log2(math.e)
    query[:], key[:] = 0, 0
    query[..., 0] = 24**0.5
    key[:, :, 128:144, 0] = 1.1 * floor * 16 / 15
    seen = [
        visible_of(SolAttention(tau=tau, query_block_size=16, key_block_size=16).plan(query, key, value, CALL))[0][8]
        for tau in (1.0, 1.09)
    ]
    # The deviation of the scores themselves is 0.28 floors: with the floor it is 1.04 of them.
    assert seen == [True, False]


def test_what_is_not_seen_enters_as_its_mean_unless_it_is_told_not_to():
    query, key, value = random_qkv(CALL.grid)
    assert SolAttention().plan(query, key, value, CALL).tail.all()
    assert SolAttention(tail=False).plan(query, key, value, CALL).tail is None


def test_keys_that_do_not_exist_move_no_threshold():
    options = SolAttention(tau=0.5, query_block_size=16, key_block_size=16)
    assert torch.equal(*maps_of_the_video(options, options, TokenGrid(4, 8, 8, text_after=64)))


def test_options_are_checked():
    with pytest.raises(ValueError, match="`tau` must be a number from 0 to 4, got -1"):
        SolAttention(tau=-1)
    with pytest.raises(ValueError, match="`tail` must be True or False, got 1"):
        SolAttention(tail=1)

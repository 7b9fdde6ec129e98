from __future__ import annotations

import pytest
import torch
from plain_rules import always, blocks_of, fewest, is_text, maps_of_the_video, order_of, random_qkv, visible_of

from diffsparse import NABLA
from diffsparse.grid import TokenGrid
from diffsparse.permutation import tile_order
from diffsparse.strategies.strategy import AttentionCall

OPTIONS = NABLA(mass=0.5, window=(3, 1, 3), patch=(2, 4), query_block_size=16, key_block_size=8)


def patch_of(token: int, grid: TokenGrid) -> tuple[int, int, int]:
    frame, place = divmod(token - grid.text_before, grid.height * grid.width)
    return frame, place // grid.width // 2, place % grid.width // 4


@pytest.mark.parametrize("window", [(3, 1, 3), (1, 3, 1), None])
@pytest.mark.parametrize("grid", [TokenGrid(3, 4, 8), TokenGrid(4, 5, 7, 2, 9), TokenGrid(1, 9, 11)], ids=str)
def test_the_fewest_blocks_of_the_pooled_softmax_are_seen_and_the_window(grid, window):
    query, key, value = (x * scale for x, scale in zip(random_qkv(grid), (4, 4, 1)))
    options = NABLA(mass=0.5, window=window, patch=(2, 4), query_block_size=16, key_block_size=8)
    plan = options.plan(query, key, value, AttentionCall(grid))
    order = order_of(plan, grid)
    assert order == tile_order(grid, (1, 2, 4)).tolist()
    queries, keys = blocks_of(order, 16), blocks_of(order, 8)
    patches = [
        [{patch_of(token, grid) for token in block if not is_text(token, grid)} for block in blocks]
        for blocks in (queries, keys)
    ]
    exact = always(queries, keys, grid)
    for head in range(3):
        means = torch.stack([key[0, head, block].mean(0) for block in keys])
        wanted = []
        for number, block in enumerate(queries):
            mass = (means @ query[0, head, block].mean(0) * 24**-0.5).softmax(-1).tolist()
            near = [
                window is not None
                and any(
                    all(abs(a - b) <= side // 2 for a, b, side in zip(mine, other, window))
                    for mine in patches[0][number]
                    for other in those
                )
                for those in patches[1]
            ]
            chosen = fewest(mass, 0.5, [False] * len(keys))
            wanted.append([any(each) for each in zip(chosen, near, exact[number])])
        assert visible_of(plan, head=head) == wanted
        assert float(torch.tensor(wanted).float().mean()) < 0.95


def test_a_window_is_cut_off_at_the_border():
    grid = TokenGrid(9, 2, 4)
    query, key, value = random_qkv(grid)
    options = NABLA(mass=0.0, window=(5, 1, 1), patch=(2, 4), query_block_size=8, key_block_size=8)
    # Without scores one block is seen for its mass, which here is the first.
    seen = visible_of(options.plan(0 * query, key, value, AttentionCall(grid)))
    assert [sum(row[1:]) for row in seen] == [2, 3, 4, 5, 5, 5, 5, 4, 3]


def test_keys_that_do_not_exist_have_no_mass():
    assert torch.equal(*maps_of_the_video(OPTIONS, OPTIONS, TokenGrid(3, 4, 8, text_after=16)))


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"`window` must be 3 positive integers, like \(11, 3, 3\), got \(3, 3\)"):
        NABLA(window=(3, 3))
    with pytest.raises(ValueError, match="`mass` must be a number from 0 to 1, got 2"):
        NABLA(mass=2)

from __future__ import annotations

import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.permutation import axis_order
from diffsparse.strategies.always_exact import exact_blocks, first_exact_place, first_frame_last

GRIDS = [TokenGrid(3, 5, 7), TokenGrid(3, 5, 7, 2, 9), TokenGrid(2, 9, 11, text_before=20), TokenGrid(1, 1, 1)]
TOKEN_MAJOR = ("height", "width", "frame")


def first_frame(grid: TokenGrid) -> list[int]:
    tokens = list(range(grid.text_before, grid.text_before + grid.height * grid.width))
    return tokens if grid.frames > 1 else []


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_first_frame_moves_to_the_texts_side_and_nothing_else_changes_its_turn(grid):
    order = axis_order(grid, TOKEN_MAJOR)
    moved, frame = first_frame_last(grid, order).tolist(), first_frame(grid)
    video, text = order.tolist()[: grid.num_video_tokens], order.tolist()[grid.num_video_tokens :]
    assert moved == [token for token in video if token not in frame] + frame + text
    assert torch.equal(first_frame_last(grid, order.expand(2, -1)), torch.tensor([moved, moved]))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("sizes", [(16, 16), (8, 16), (16, 8)])
@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("keys", [False, True])
def test_exact_blocks_hold_an_exact_token_or_are_the_nearest(grid, sizes, queries, keys):
    query_size, key_size = sizes
    exact = exact_blocks(grid, *sizes, first_frame_queries=queries, first_frame_keys=keys)
    order = first_frame_last(grid, axis_order(grid, TOKEN_MAJOR)).tolist()
    text = [*range(grid.text_before), *range(grid.num_tokens - grid.text_after, grid.num_tokens)]

    def holds(block: int, size: int, with_frame: bool) -> bool:
        tokens = order[block * size : (block + 1) * size]
        return any(token in text or (with_frame and token in first_frame(grid)) for token in tokens)

    for q, row in enumerate(exact.tolist()):
        distances = [abs((q + 0.5) * query_size - (k + 0.5) * key_size) for k in range(len(row))]
        for k, seen in enumerate(row):
            expected = holds(q, query_size, queries) or holds(k, key_size, keys) or distances[k] == min(distances)
            assert seen == expected, (q, k)


def test_keys_in_an_order_of_their_own_have_no_place_beside_the_query():
    grid = TokenGrid(3, 5, 7, text_after=3)
    exact = exact_blocks(grid, 16, 16, own_place=False)
    assert exact[:6].sum().item() == 6  # the last block, with the text, and no other
    assert exact[6].all()


def test_the_first_frame_of_an_image_is_not_special():
    image = TokenGrid(1, 9, 11, text_after=3)
    assert first_exact_place(image, first_frame=True) == 99
    assert first_exact_place(TokenGrid(2, 9, 11), first_frame=True) == 99
    assert first_exact_place(TokenGrid(2, 9, 11)) == 198

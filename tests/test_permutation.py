from __future__ import annotations

import itertools

import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.permutation import AXES, Permutation, axis_order, hilbert_order, tile_order

GRID = TokenGrid(3, 5, 7, text_before=2, text_after=4)


def token(frame: int, row: int, column: int) -> int:
    return GRID.text_before + (frame * GRID.height + row) * GRID.width + column


@pytest.mark.parametrize("axes", itertools.permutations(AXES))
def test_axis_order_runs_through_the_axes_in_turn(axes):
    sizes = {"frame": 3, "height": 5, "width": 7}
    places = itertools.product(*(range(sizes[axis]) for axis in axes))
    expected = [token(*(dict(zip(axes, place))[axis] for axis in AXES)) for place in places]
    assert axis_order(GRID, axes)[: GRID.num_video_tokens].tolist() == expected


def test_tile_order_fills_one_tile_before_the_next():
    order = tile_order(GRID, (2, 2, 4)).tolist()
    first_tile = [token(f, r, c) for f in range(2) for r in range(2) for c in range(4)]
    ragged_tile = [token(f, r, c) for f in range(2) for r in range(2) for c in range(4, 7)]
    assert order[: len(first_tile) + len(ragged_tile)] == first_tile + ragged_tile


def places_along_the_curve(grid: TokenGrid) -> list[tuple[int, int, int]]:
    tokens = (hilbert_order(grid)[: grid.num_video_tokens] - grid.text_before).tolist()
    return [(i // (grid.height * grid.width), i // grid.width % grid.height, i % grid.width) for i in tokens]


@pytest.mark.parametrize("grid", [TokenGrid(8, 8, 8), TokenGrid(2, 2, 2), TokenGrid(1, 16, 16), TokenGrid(4, 1, 1)])
def test_a_hilbert_curve_goes_from_neighbour_to_neighbour(grid):
    places = places_along_the_curve(grid)
    steps = [sum(abs(a - b) for a, b in zip(here, there)) for here, there in itertools.pairwise(places)]
    assert steps == [1] * (grid.num_video_tokens - 1)


def test_each_eighth_of_a_hilbert_curve_fills_an_octant():
    places = places_along_the_curve(TokenGrid(8, 8, 8))
    octants = [tuple(side // 4 for side in place) for place in places]
    assert all(len(set(octants[first : first + 64])) == 1 for first in range(0, 512, 64))


def test_a_grid_has_its_part_of_the_curve_through_the_cube_around_it():
    inside = [place for place in places_along_the_curve(TokenGrid(8, 8, 8)) if all(map(int.__lt__, place, (3, 5, 7)))]
    assert places_along_the_curve(GRID) == inside


@pytest.mark.parametrize(
    "order", [axis_order(GRID, ("width", "frame", "height")), tile_order(GRID, (2, 3, 2)), hilbert_order(GRID)]
)
def test_every_token_appears_once_and_text_comes_last(order):
    assert sorted(order.tolist()) == list(range(GRID.num_tokens))
    assert order[GRID.num_video_tokens :].tolist() == [0, 1, *range(107, 111)]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens_first", [False, True], ids=["heads first", "tokens first"])
def test_undo_reverses_apply(batch, tokens_first):
    heads, tokens, dim = 3, GRID.num_tokens, 5
    permutation = Permutation(torch.stack([torch.randperm(tokens) for _ in range(heads)]))
    x = torch.randn(batch, tokens, heads, dim).transpose(1, 2)
    x = x if tokens_first else x.contiguous()
    applied = permutation.apply(x)
    for head in range(heads):
        assert torch.equal(applied[:, head], x[:, head, permutation.order[head]])
    assert torch.equal(permutation.undo(applied), x)


def test_one_order_serves_all_heads():
    permutation = Permutation(torch.randperm(11)[None])
    x = torch.randn(2, 3, 11, 4)
    assert torch.equal(permutation.apply(x), x[:, :, permutation.order[0]])
    assert torch.equal(permutation.undo(permutation.apply(x)), x)


def test_undo_leaves_the_memory_layout_of_projections():
    permutation = Permutation(torch.randperm(11)[None])
    assert permutation.undo(torch.randn(2, 3, 11, 4)).transpose(1, 2).is_contiguous()


def test_refuses_unknown_axes_and_empty_tiles():
    with pytest.raises(ValueError, match="`axes`"):
        axis_order(GRID, ("time", "height", "width"))
    with pytest.raises(ValueError, match="`tile`"):
        tile_order(GRID, (2, 0, 2))


def test_heads_may_choose_among_few_orders():
    grid = TokenGrid(3, 5, 7)
    orders = torch.stack([axis_order(grid, axes) for axes in (AXES, AXES[::-1])])
    choice = torch.tensor([1, 0, 1, 1])
    x = torch.randn(2, 4, grid.num_tokens, 8)
    chosen = Permutation(orders, choice)
    written_out = Permutation(orders[choice])
    assert torch.equal(chosen.apply(x), written_out.apply(x))
    assert torch.equal(chosen.undo(x), written_out.undo(x))

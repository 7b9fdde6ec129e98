from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffsparse.block_mask import BlockMask
from diffsparse.eval import inspect_maps
from diffsparse.eval.inspect_maps import attention_maps, cell_size
from diffsparse.eval.inspect_measures import Attended
from diffsparse.grid import TokenGrid
from diffsparse.permutation import Permutation, axis_order
from diffsparse.plan import AttentionPlan

GRID = TokenGrid(3, 5, 7)


def call_of(plan, grid, query, key, scale=None):
    value = torch.zeros_like(key)
    return Attended(plan, query, key, value, value, grid, scale=scale)


def random_call(grid, block=8, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, 2, grid.num_tokens, dim, generator=generator) for _ in range(2))
    blocks = -(-grid.num_tokens // block)
    visible = torch.rand(1, 2, blocks, blocks, generator=generator) < 0.4
    orders = torch.stack([torch.arange(grid.num_tokens), axis_order(grid, ("height", "width", "frame"))])
    plan = AttentionPlan(
        Permutation(orders),
        BlockMask.from_visible(visible | torch.eye(blocks).bool(), grid.num_tokens, block, block),
    )
    return call_of(plan, grid, 3 * query, key), visible | torch.eye(blocks).bool()


def test_cells_hold_the_mean_attention_of_their_pairs(monkeypatch):
    monkeypatch.setattr(inspect_maps, "MOST_CELLS", 30)  # cells of 4 tokens, the last of 1
    monkeypatch.setattr(inspect_maps, "MAX_SCORES", 1000)  # a few rows at a time
    call, visible = random_call(GRID)
    pair = attention_maps(call, head=1)
    tokens = GRID.num_tokens
    weights = (call.query[0, 1].double() @ call.key[0, 1].double().T * 8**-0.5).softmax(-1)
    order = call.plan.permutation.order[1]
    pairs = visible[0, 1].repeat_interleave(8, 0)[:tokens].repeat_interleave(8, 1)[:, :tokens]
    own_pairs = torch.zeros_like(pairs)
    own_pairs[order[:, None], order] = pairs
    for shown, full, kept in (
        (pair.before, weights, own_pairs),
        (pair.after, weights[order][:, order], pairs),
    ):
        assert shown.cell == 4
        for i in range(27):
            for j in range(27):
                cell = np.s_[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                assert shown.attention[i, j] == pytest.approx(float(full[cell].mean()) * tokens, rel=1e-4)
                share = float((full[cell] * kept[cell]).sum() / full[cell].sum())
                assert shown.kept[i, j] == pytest.approx(share, abs=1e-4)
    assert set(np.unique(pair.after.kept.round(4))) == {0, 1}  # no block's edge within a cell
    assert (pair.before.order, pair.after.order) == ("own", "height width frame")


@pytest.mark.parametrize("in_own_order", [False, True])
def test_queries_of_the_grid_alone_have_the_maps_that_they_have_among_the_text(in_own_order):
    grid = TokenGrid(3, 5, 7, text_after=4)
    call, _ = random_call(grid)
    plan = replace(call.plan, permutation=None) if in_own_order else call.plan
    num = grid.num_video_tokens
    joint = call_of(plan, grid, call.query, call.key)
    alone = call_of(plan.of_first_queries(num), grid, call.query[:, :, :num], call.key)
    for head in range(2):
        for when in ("before", "after"):
            shown, expected = (getattr(attention_maps(each, head), when) for each in (alone, joint))
            assert (shown.order, shown.cell) == (expected.order, 1)
            np.testing.assert_allclose(shown.attention, expected.attention[:num], rtol=1e-5)
            np.testing.assert_allclose(shown.kept, expected.kept[:num], atol=1e-6)


def test_attention_through_time_is_a_diagonal_once_places_are_put_together():
    """Planted: each token attends to its own place in all frames, evenly."""
    grid = TokenGrid(4, 4, 8)
    place = torch.arange(grid.num_tokens) % 32
    code = torch.eye(32)[place][None, None]
    permutation = Permutation(axis_order(grid, ("height", "width", "frame"))[None])
    mask = BlockMask.from_visible(torch.eye(32).bool()[None, None], grid.num_tokens, 4, 4)
    pair = attention_maps(call_of(AttentionPlan(permutation, mask), grid, 100 * code, code, scale=1.0), head=0)
    before, after = (shown.attention for shown in (pair.before, pair.after))
    cells = np.arange(128) // pair.after.cell
    assert pair.after.cell == 1
    same_place = (cells[:, None] // 4) == (cells // 4)
    assert after[same_place] == pytest.approx(128 / 4)
    assert after[~same_place] == pytest.approx(0, abs=1e-6)
    assert (pair.after.kept[same_place] == 1).all()
    assert (cells[:, None] % 32 == cells % 32)[before > 1].all()
    assert pair.before.kept[before > 1] == pytest.approx(1)


def test_each_row_holds_all_attention_where_rows_are_sampled(monkeypatch):
    monkeypatch.setattr(inspect_maps, "MOST_CELLS", 8)
    monkeypatch.setattr(inspect_maps, "ROWS_A_CELL", 4)
    call, _ = random_call(TokenGrid(5, 8, 10))
    for shown in vars(attention_maps(call, head=1)).values():
        if isinstance(shown, inspect_maps.AttentionMap):
            sizes = np.full(len(shown.kept), shown.cell)
            sizes[-1] = 400 - shown.cell * (len(sizes) - 1)
            assert (shown.attention * sizes).sum(-1) / 400 == pytest.approx(1)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(made, torch.Tensor):
                self.numel = max(self.numel, made.untyped_storage().nbytes() // made.element_size())
        return result


def test_memory_does_not_grow_with_the_square_of_the_tokens(monkeypatch):
    monkeypatch.setattr(inspect_maps, "MAX_SCORES", 1 << 16)
    monkeypatch.setattr(inspect_maps, "MOST_CELLS", 64)
    call, _ = random_call(TokenGrid(10, 20, 30), block=64, dim=4)
    with LargestTensor() as largest:
        attention_maps(call, head=1)
    # Three kinds of sums of a few rows, far below the 36 million pairs of tokens.
    assert largest.numel < 4 * (1 << 16)


@pytest.mark.parametrize(
    ("tokens", "blocks", "expected"),
    [(4352, (64, 64), 16), (75_600, (128, 64), 256), (100, (64, 64), 1), (500, (48, 32), 2), (2000, (50, 64), 7)],
)
def test_cells_are_few_and_fit_the_blocks_where_they_can(tokens, blocks, expected):
    assert cell_size(tokens, *blocks) == expected
    assert -(-tokens // expected) <= inspect_maps.MOST_CELLS

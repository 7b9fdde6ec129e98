from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_rules import qkv_of_labels

from diffsparse import SparseVideoGen
from diffsparse.grid import TokenGrid
from diffsparse.heads import HeadClass
from diffsparse.strategies.strategy import AttentionCall

WAN_720P = TokenGrid(21, 45, 80)
HUNYUAN_720P = TokenGrid(33, 45, 80, text_after=256)
BLOCK_ROUNDING = 3 * 64
"""Tokens: a band ends within a block, and so does what comes before text or the first frame, in rows and columns."""
SMALL = {"query_block_size": 16, "key_block_size": 16, "sampled_rows": 32}


def density_in_tokens(grid: TokenGrid, density: float, first_frame: bool, temporal: bool) -> float:
    """The share of the token pairs that Sparse VideoGen keeps, one query after the other."""
    video, everything = grid.num_video_tokens, grid.num_tokens
    share = (density * everything**2 - everything**2 + video**2) / video**2
    width = int(video * (1 - (1 - share) ** 0.5))
    at = np.arange(video)
    low, high = np.maximum(at - width, 0), np.minimum(at + width, video - 1)
    kept = high - low + 1 + everything - video
    if first_frame:
        frame = np.arange(grid.height * grid.width) * (grid.frames if temporal else 1)
        in_band = np.searchsorted(frame, high, side="right") - np.searchsorted(frame, low)
        kept += len(frame) - in_band
    return float(kept.sum() + (everything - video) * everything) / everything**2


@pytest.mark.parametrize(
    ("grid", "density", "first_frame", "published"), [(WAN_720P, 0.30, True, 0.340), (HUNYUAN_720P, 0.25, False, 0.249)]
)
def test_the_executed_density_is_that_of_the_rule_and_the_published_one(grid, density, first_frame, published):
    executed = SparseVideoGen(density, first_frame).masks(grid).mask.density.tolist()
    for temporal in (False, True):
        expected = density_in_tokens(grid, density, first_frame, temporal)
        assert executed[temporal] == pytest.approx(expected, abs=BLOCK_ROUNDING / grid.num_tokens)
    # The published band ends at a multiple of 128 tokens on either side.
    rounding = BLOCK_ROUNDING + 2 * 128
    assert executed[0] == pytest.approx(published, abs=rounding / grid.num_tokens)


def test_all_see_the_first_frame_in_both_orders():
    grid = TokenGrid(5, 6, 8, text_before=3)
    masks = SparseVideoGen(0.2, **SMALL).masks(grid)
    for number, order in enumerate(masks.orders):
        places = torch.argsort(order)[grid.text_before : grid.text_before + 48]
        assert masks.visible[number][:, places // 16].all()
    without = SparseVideoGen(0.2, first_frame=False, **SMALL).masks(grid)
    assert without.mask.density.max() < masks.mask.density.min()


def test_heads_get_the_band_in_which_their_tokens_are_near():
    grid = TokenGrid(12, 6, 8)
    frame, place = torch.arange(576) // 48, torch.arange(576) % 48
    query, key, value = qkv_of_labels([frame, place, place, frame])
    plan = SparseVideoGen(0.25, **SMALL).plan(query, key, value, AttentionCall(grid))
    spatial, temporal = HeadClass.SPATIAL, HeadClass.TEMPORAL
    assert plan.classes.tolist() == [spatial, temporal, temporal, spatial]
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    errors = (plan.attend(query, key, value) - dense).norm(dim=(2, 3)) / dense.norm(dim=(2, 3))
    assert errors.max() < 0.2


def test_what_is_judged_is_what_is_executed():
    grid = TokenGrid(6, 6, 8, text_after=5)
    query, key, value = (torch.randn(2, 3, grid.num_tokens, 24) for _ in range(3))
    strategy = SparseVideoGen(0.3, **SMALL)
    masks, rows = strategy.masks(grid), torch.tensor([3, 57, 200])
    errors = masks.errors(query, key, value, rows, AttentionCall(grid))
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)[:, :, rows]
    for number in range(2):
        output = masks.plan(torch.full((3,), number)).attend(query, key, value)[:, :, rows]
        expected = (output - exact).square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3))
        assert torch.allclose(errors[number], expected, rtol=1e-4)


def test_text_that_takes_more_than_the_density_leaves_a_block():
    grid = TokenGrid(4, 4, 4, text_after=64)
    masks = SparseVideoGen(0.1, first_frame=False, **SMALL).masks(grid)
    assert (masks.visible[:, :4, :4] == torch.eye(4, dtype=torch.bool)).all()


@pytest.mark.parametrize("wrong", [{"density": 0}, {"density": True}, {"first_frame": 1}, {"sampled_rows": 0}])
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SparseVideoGen(**wrong)

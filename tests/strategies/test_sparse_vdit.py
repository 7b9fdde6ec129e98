from __future__ import annotations

import numpy as np
import pytest
import torch

from diffsparse import SparseVDiT
from diffsparse.grid import TokenGrid
from diffsparse.strategies.sparse_vdit import Mode
from diffsparse.strategies.strategy import AttentionCall

WAN_720P = TokenGrid(21, 45, 80)
HUNYUAN_720P = TokenGrid(33, 45, 80, text_after=256)
SMALL = {"query_block_size": 16, "key_block_size": 16}


@pytest.mark.parametrize("grid", [WAN_720P, HUNYUAN_720P], ids=["Wan", "HunyuanVideo"])
def test_bands_and_stripes_have_the_density_asked_for(grid):
    executed = SparseVDiT(0.25).masks(grid).mask.density.tolist()
    assert executed[Mode.DENSE] == 1
    # A band ends within a block, and so does the video before the text, in rows and columns.
    rounding = 3 * 64 / grid.num_tokens
    for mode in (Mode.DIAGONAL, Mode.MULTI_DIAGONAL, Mode.VERTICAL_STRIPE):
        assert executed[mode] == pytest.approx(0.25, abs=rounding)


def test_stripes_hold_text_the_first_frame_and_blocks_at_equal_distances():
    grid = TokenGrid(6, 8, 8, text_after=8)  # 24 blocks of video, a frame is 4 of them, and one of text
    masks = SparseVDiT(0.4, **SMALL).masks(grid)
    # What all queries see but for their own place.
    stripes = masks.visible[Mode.VERTICAL_STRIPE][:24].sum(0) == 24
    assert stripes[[0, 1, 2, 3, 24]].all()
    gaps = np.diff(stripes[4:24].nonzero()[:, 0].numpy())
    assert len(gaps) >= 3
    assert gaps.max() - gaps.min() <= 1
    without = SparseVDiT(0.4, first_frame=False, **SMALL).masks(grid).visible[Mode.VERTICAL_STRIPE][:24].sum(0) == 24
    assert without.sum() == stripes.sum()
    assert not without[:4].all()


def planted(grid: TokenGrid) -> list[torch.Tensor]:
    """q, k, v [1, 5, S, 64] of heads made for the modes in turn."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.arange(grid.num_tokens)
    frame, place = tokens // 64, tokens % 64
    nowhere = torch.randint(0, 12, tokens.shape, generator=generator)
    everywhere, first_frame = torch.zeros_like(frame), torch.where(frame == 0, 0, 1 + tokens % 63)
    query_labels = torch.stack([nowhere, nowhere, frame, place, everywhere])
    key_labels = torch.stack([nowhere, nowhere, frame, place, first_frame])
    query, key = (10 * torch.eye(64)[labels][None] for labels in (query_labels, key_labels))
    noise = torch.randn(3, *query.shape, generator=generator)
    value = noise[2] * torch.tensor([3.0, 0.1, 3.0, 3.0, 3.0])[:, None, None]
    return [query + 0.1 * noise[0], key + 0.1 * noise[1], value]


def test_heads_get_the_mode_they_are_made_for():
    grid = TokenGrid(8, 8, 8)
    query, key, value = planted(grid)
    plan = SparseVDiT(0.3, weight=0.1, largest=0.06, **SMALL).plan(query, key, value, AttentionCall(grid))
    assert plan.skipped.tolist() == [False, True, False, False, False]
    density = plan.mask.density
    assert density[0] == 1
    output, dense = plan.attend(query, key, value), torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert torch.allclose(output[:, 0], dense[:, 0], atol=1e-5)
    assert (output[:, 1] == 0).all()
    masks = SparseVDiT(0.3, **SMALL).masks(grid)
    for head, mode in ((2, Mode.DIAGONAL), (3, Mode.MULTI_DIAGONAL), (4, Mode.VERTICAL_STRIPE)):
        assert torch.equal(plan.mask.visible()[0, head], masks.visible[mode])
        assert torch.equal(plan.permutation.order[head], masks.orders[int(mode == Mode.MULTI_DIAGONAL)])
        assert (output[:, head] - dense[:, head]).norm() < 0.2 * dense[:, head].norm()


@pytest.mark.parametrize(
    ("relative", "weight", "largest"), [(False, 0.05, 0.1), (False, 2.0, 0.1), (True, 0.05, 0.5), (True, 2.0, 0.9)]
)
def test_the_mode_follows_from_errors_and_densities(relative, weight, largest):
    grid = TokenGrid(4, 8, 8, text_after=10)
    # As planted and less so, so that modes come close.
    query, key, value = (torch.cat([x, x], dim=1) for x in planted(grid))
    query = query * torch.tensor([1.0] * 5 + [0.6] * 5)[:, None, None]
    options = SparseVDiT(0.4, weight, largest, relative, sampled_rows=256, **SMALL)  # all of the video
    plan, masks = options.plan(query, key, value, AttentionCall(grid)), options.masks(grid)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)[:, :, :256]
    losses = np.zeros((5, 10))
    for mode in list(Mode)[1:]:
        output = masks.plan(torch.full((10,), int(mode))).attend(query, key, value)[:, :, :256]
        output = torch.zeros_like(output) if mode == Mode.SKIP else output
        error = (output - dense).square().mean((0, 2, 3))
        error = error / dense.square().mean((0, 2, 3)) if relative else error
        density = 0.0 if mode == Mode.SKIP else masks.visible[mode].double().mean().item()
        losses[mode] = error.double().numpy() + weight * density
    expected = np.where(losses[1:].min(0) > largest, 0, 1 + losses[1:].argmin(0))
    assert plan.skipped.tolist() == (expected == Mode.SKIP).tolist()
    for head, mode in enumerate(expected):
        assert torch.equal(plan.mask.visible()[0, head], masks.visible[mode])


def test_plans_leave_the_masks_of_their_grid_as_they_are():
    grid = TokenGrid(8, 8, 8)
    strategy = SparseVDiT(0.3, **SMALL)
    # What is made in inference mode must not be written to outside it.
    with torch.inference_mode():
        strategy.plan(*planted(grid), AttentionCall(grid))
    strategy.plan(*planted(grid), AttentionCall(grid))
    mask = strategy.masks(grid).mask
    assert torch.equal(mask.density, mask.visible().float().mean((0, 2, 3)))


@pytest.mark.parametrize("wrong", [{"density": 0}, {"weight": -1}, {"largest": "1"}, {"relative": 1}])
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SparseVDiT(**wrong)

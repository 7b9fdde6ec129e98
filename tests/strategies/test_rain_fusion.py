from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_rules import qkv_of_labels

from diffsparse import RainFusion
from diffsparse.grid import TokenGrid
from diffsparse.heads import HeadClass
from diffsparse.strategies.strategy import AttentionCall

WAN_720P = TokenGrid(21, 45, 80)
BLOCK_ROUNDING = 3 * 64 / WAN_720P.num_tokens
"""A band or a checkerboard ends within a block, and so does what comes before the first frame, in rows and columns."""
GRID = TokenGrid(6, 6, 8, text_before=3, text_after=5)
SMALL = {"query_block_size": 16, "key_block_size": 16, "sampled_rows": 48}
TEMPORAL, SPATIAL, TEXTURAL = HeadClass.TEMPORAL, HeadClass.SPATIAL, HeadClass.TEXTURAL


FRAME, PLACE = torch.arange(6 * 48) // 48, torch.arange(6 * 48) % 48


def recalls(query: torch.Tensor, key: torch.Tensor, bandwidth: float) -> tuple[np.ndarray, np.ndarray]:
    """Of the temporal band among the tokens of frame 1, of the spatial band among every 5th token of frames 1 to 5."""
    found = []
    start = GRID.text_before + 48
    for tokens in (range(start, start + 48), range(start, start + 240, 5)):
        q, k = (x[0, :, list(tokens)].double().numpy() for x in (query, key))
        weights = np.exp(q @ k.transpose(0, 2, 1) / 48**0.5)
        band = np.abs(np.subtract.outer(np.arange(48), np.arange(48))) <= int(48 * bandwidth)
        found.append((weights * band / weights.sum(-1, keepdims=True)).sum((1, 2)) / 48)
    return found[0], found[1]


@pytest.mark.parametrize(("head_class", "published"), [(TEMPORAL, 0.387), (SPATIAL, 0.418)])
def test_the_executed_density_is_the_published_one(head_class, published):
    layout = RainFusion(density=1 - 0.64, rule="two-way", band_multiple=128).masks(WAN_720P)
    density = layout.mask.density[0 if head_class == TEMPORAL else 1].item()
    assert density == pytest.approx(published, abs=BLOCK_ROUNDING)


@pytest.mark.parametrize("stride", [2, 3])
def test_the_checkerboard_keeps_its_share_of_the_keys(stride):
    density = RainFusion(stride=stride).masks(WAN_720P).mask.density[-1].item()
    kept = sum((row - column) % stride == 0 for row in range(45) for column in range(80)) * 20 + 3600
    expected = (kept * 72000 + 75600 * 3600) / 75600**2
    assert density == pytest.approx(expected, abs=BLOCK_ROUNDING)


@pytest.mark.parametrize("alternate", [False, True])
def test_a_textural_head_sees_the_checkerboard_the_first_frame_and_text(alternate):
    grid = TokenGrid(5, 8, 8, text_after=4)
    masks = RainFusion(alternate=alternate, **SMALL).masks(grid)
    order = masks.key_orders[2]
    seen = {int(token) for block in masks.visible[2][0].nonzero() for token in order[int(block) * 16 :][:16]}
    frame, row, column = np.unravel_index(np.arange(320), (5, 8, 8))
    kept = (row - column + frame * alternate) % 2 == 0
    assert seen == set(np.flatnonzero(kept | (frame == 0)).tolist()) | {320, 321, 322, 323}


def test_heads_get_their_class():
    query, key, value = qkv_of_labels([FRAME, PLACE, torch.randint(0, 40, (288,))], text=(3, 5), length=7)
    plan = RainFusion(density=0.36, **SMALL).plan(query, key, value, AttentionCall(GRID))
    assert plan.classes.tolist() == [SPATIAL, TEMPORAL, TEXTURAL]
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    output = plan.attend(query, key, value)
    errors = (output - dense).norm(dim=(2, 3)) / dense.norm(dim=(2, 3))
    assert errors[0, :2].max() < 0.2
    # A checkerboard that keeps everything is dense attention.
    everything = RainFusion(density=0.01, stride=1, **SMALL).plan(query, key, value, AttentionCall(GRID))
    assert everything.classes[2] == TEXTURAL
    assert torch.allclose(everything.attend(query, key, value)[:, 2], dense[:, 2], atol=1e-5)


@pytest.mark.parametrize("alpha", [0.42, 0.45])
@pytest.mark.parametrize("rule", ["three-way", "two-way"])
def test_the_class_follows_from_the_recalls(rule, alpha):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 40, GRID.num_tokens, 48).unbind()
    query, key = 2 * query, 2 * key  # recalls that differ
    options = RainFusion(density=0.45, rule=rule, alpha=alpha, **SMALL)
    classes = options.plan(query, key, value, AttentionCall(GRID)).classes
    temporal, spatial = recalls(query, key, 1 - (1 - 0.45) ** 0.5)
    for head, (t, s) in enumerate(zip(temporal, spatial)):
        if rule == "two-way":
            expected = TEMPORAL if t > alpha or t > s else SPATIAL
        else:
            expected = TEMPORAL if t >= alpha else SPATIAL if s >= alpha else TEXTURAL
        assert classes[head] == expected
    assert len(set(classes.tolist())) > 1


def test_rain_fusion_plus_takes_the_smallest_band_that_will_do():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 40, GRID.num_tokens, 48).unbind()
    query, key = 2 * query, 2 * key
    bandwidths = (0.5, 0.25, 0.125)
    options = RainFusion(alpha=0.45, bandwidths=bandwidths, **SMALL)
    plan, masks = options.plan(query, key, value, AttentionCall(GRID)), options.masks(GRID)
    by_bandwidth = [recalls(query, key, bandwidth) for bandwidth in sorted(bandwidths)]
    taken = set()
    for head in range(40):
        enough = [recall[head] >= 0.45 for pair in by_bandwidth for recall in pair]
        number = enough.index(True) if True in enough else 6
        taken.add(number)
        assert torch.equal(plan.mask.visible()[0, head], masks.visible[number])
    assert len(taken) > 1


def test_all_see_the_first_frame_and_it_sees_all():
    masks = RainFusion(density=0.2, **SMALL).masks(GRID)
    for number in range(3):
        for order, blocks in (
            (masks.orders[number], masks.visible[number]),
            (masks.key_orders[number], masks.visible[number].T),
        ):
            places = torch.argsort(order)[GRID.text_before : GRID.text_before + 48]
            assert blocks[places // 16].all()


@pytest.mark.parametrize(
    "wrong", [{"density": 0}, {"rule": "four-way"}, {"alpha": 1.5}, {"stride": 0}, {"bandwidths": ()}]
)
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RainFusion(**wrong)


def test_two_way_knows_no_bandwidths():
    with pytest.raises(ValueError, match="bandwidths"):
        RainFusion(rule="two-way", bandwidths=(0.1,))

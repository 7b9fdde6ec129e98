from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plain_rules import qkv_of_labels, random_qkv
from strategies.test_strategies import NoWaiting, are_the_same
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.heads import HeadClass
from diffsparse.strategies.adaptive import CANDIDATES, Adaptive, Candidate
from diffsparse.strategies.adaptive_geometry import geometry_of
from diffsparse.strategies.strategy import AttentionCall

GRID = TokenGrid(12, 6, 8)
SMALL = {"query_block_size": 16, "key_block_size": 16, "tile": (2, 2, 4), "sampled_rows": 32}


def candidate(order: str, rule: str) -> Candidate:
    return Candidate(HeadClass.TEXTURAL, order, rule)


def planted_heads(classes: list[HeadClass], seed: int = 0) -> list[Tensor]:
    """Query, key and value of heads that attend by frame, by place, or by a content of patches in space and time."""
    frame, row, column = (x.reshape(-1) for x in torch.meshgrid(*map(torch.arange, (12, 6, 8)), indexing="ij"))
    patch = ((frame // 2) * 3 + row // 2) * 2 + column // 4
    content = torch.randint(0, 5, (int(patch.max()) + 1,), generator=torch.Generator().manual_seed(seed))[patch]
    labels = {HeadClass.SPATIAL: frame, HeadClass.TEMPORAL: row * 8 + column, HeadClass.TEXTURAL: content}
    return qkv_of_labels([labels[each] for each in classes], seed=seed)


def test_planted_heads_get_their_class_100_of_100_times():
    wrong = []
    for seed in range(100):
        plan = Adaptive(density=0.25, **SMALL).plan(*planted_heads(list(HeadClass), seed), AttentionCall(GRID))
        classes = plan.classes.tolist()
        if classes != list(HeadClass):
            wrong.append((seed, classes))
    assert not wrong


@pytest.mark.parametrize(
    "grid", [GRID, TokenGrid(3, 5, 7, 2, 9), TokenGrid(1, 9, 11, text_before=20), TokenGrid(1, 1, 1)]
)
@pytest.mark.parametrize("density", [0.1, 0.5])
@pytest.mark.parametrize("equal_heads", [True, False])
def test_text_is_exact_and_the_budget_is_kept(grid, density, equal_heads):
    options = Adaptive(density=density, equal_heads=equal_heads, **SMALL)
    visible = options.plan(*random_qkv(grid, batch=2), AttentionCall(grid)).mask.visible()
    text_blocks = slice(grid.num_video_tokens // 16, None) if grid.num_tokens > grid.num_video_tokens else slice(0, 0)
    assert visible[:, :, text_blocks].all()
    assert visible[..., text_blocks].all()
    video_rows = visible[:, :, : grid.num_video_tokens // 16]
    keys = visible.shape[-1]
    least = len(range(keys)[text_blocks]) + 1
    budget = min(keys, max(round(density * keys), least))
    counts = video_rows.sum(-1)  # [B, H, Q]
    assert (counts.sum(1) == 3 * budget).all()
    assert (counts == counts[..., :1]).all()
    assert (counts >= min(least, budget)).all()
    if equal_heads:
        assert (counts == budget).all()


@pytest.mark.parametrize("grid", [GRID, TokenGrid(3, 5, 7, 2, 9), TokenGrid(1, 9, 11, text_before=20)])
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_density_and_size_of_a_plan_are_known_beforehand(grid, density):
    adaptive = Adaptive(density=density, **SMALL)
    mask = adaptive.plan(*random_qkv(grid), AttentionCall(grid)).mask
    assert adaptive.executed_density(grid) == pytest.approx(mask.density.mean().item())
    first = adaptive.plan(*random_qkv(grid), AttentionCall(grid, progress=0.0)).mask
    kept = first.bits, first.counts, first.schedule(1, 3)
    assert adaptive.plan_bytes(grid, 3) == sum(x.nbytes for x in kept)


def test_heads_that_gain_from_more_blocks_get_them_and_the_layer_is_closer_to_dense():
    query, key, value = planted_heads([HeadClass.SPATIAL, HeadClass.TEXTURAL])
    dense = F.scaled_dot_product_attention(query, key, value)
    errors = {}
    for equal_heads in (True, False):
        plan = Adaptive(density=0.2, equal_heads=equal_heads, **SMALL).plan(query, key, value, AttentionCall(GRID))
        errors[equal_heads] = (plan.attend(query, key, value) - dense).norm()
    easy_density, hard_density = plan.mask.density.tolist()
    assert hard_density > 1.5 * easy_density
    assert errors[False] < 0.8 * errors[True]


def test_the_plan_of_a_real_model_is_small():
    # HunyuanVideo at 720p: 119,056 tokens in 931 query blocks and 1,861 key blocks, a bit for each pair. Of each query
    # block also how many it sees, and its place in the schedule.
    assert Adaptive().plan_bytes(TokenGrid(33, 45, 80, text_after=256), 24) == 24 * 931 * (233 + 8)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("front_load", [0.0, 0.5, 1.0])
def test_the_first_sparse_steps_get_more_and_all_together_what_was_asked_for(density, front_load):
    grid = TokenGrid(5, 16, 20)  # 100 key blocks
    adaptive = Adaptive(density=density, front_load=front_load, **SMALL)
    qkv = random_qkv(grid, heads=2)
    calls = [AttentionCall(grid, progress=progress) for progress in (0.125, 0.375, 0.625, 0.875)]
    densities = [adaptive.plan(*qkv, call).mask.density.mean().item() for call in calls]
    assert sum(densities) / 4 == pytest.approx(density, abs=0.01)
    steepness = 0.0 if density == 1.0 else min(front_load, 1 / density - 1)
    assert densities[0] - densities[-1] == pytest.approx(1.5 * steepness * density, abs=0.02)


def test_every_query_block_sees_itself():
    visible = Adaptive(density=0.05, **SMALL).plan(*random_qkv(GRID), AttentionCall(GRID)).mask.visible()
    assert visible.diagonal(dim1=-2, dim2=-1).all()


def blocks_chosen(key, value, rule, tail):
    """Of a head in which all queries want the first direction: two blocks of 16 tokens, one of them its own."""
    query = torch.zeros_like(key)
    query[..., 0] = 10.0
    strategy = Adaptive(density=2 / 36, candidates=(candidate("frame-major", rule),), tail=tail, **SMALL)
    visible = strategy.plan(query, key, value, AttentionCall(GRID)).mask.visible()[0, 0]
    assert (visible.sum(-1) == 2).all()
    visible.fill_diagonal_(False)
    return set(visible.nonzero()[:, 1].tolist())


@pytest.mark.parametrize("tail", [False, True])
def test_a_few_keys_that_matter_are_found_among_others_that_do_not(tail):
    # Block 20 has one key that all queries want, and others that make up for it in the mean; all of block 8 is wanted
    # a little.
    key, value = torch.zeros(1, 1, GRID.num_tokens, 16), torch.randn(1, 1, GRID.num_tokens, 16)
    key[0, 0, 330, 0] = 4.0
    key[0, 0, 320:330, 0] = -4.0
    key[0, 0, 128:144, 0] = 0.1
    assert 20 in blocks_chosen(key, value, "impact", tail)
    assert 20 not in blocks_chosen(key, value, "top", tail)


def test_a_block_that_its_mean_stands_for_is_left_to_the_tail():
    # All queries want block 8 most, whose keys are the same; those of block 20 differ.
    key, value = torch.zeros(1, 1, GRID.num_tokens, 16), torch.randn(1, 1, GRID.num_tokens, 16)
    key[0, 0, 128:144, 0] = 1.0
    key[0, 0, 320:336, 0] = torch.linspace(-1.0, 0.9, 16)
    assert 8 in blocks_chosen(key, value, "impact", tail=False)
    assert 20 in blocks_chosen(key, value, "impact", tail=True)
    assert 8 not in blocks_chosen(key, value, "impact", tail=True)


@pytest.mark.parametrize("grid", [GRID, TokenGrid(3, 5, 7, 2, 9)])
def test_full_density_is_dense_attention(grid):
    query, key, value = random_qkv(grid, batch=2)
    output = Adaptive(density=1.0, **SMALL).plan(query, key, value, AttentionCall(grid)).attend(query, key, value)
    assert torch.allclose(output, F.scaled_dot_product_attention(query, key, value), atol=1e-5)


def test_an_easy_head_keeps_its_output_at_a_quarter_of_the_blocks():
    query, key, value = planted_heads(list(HeadClass))
    output = Adaptive(density=0.25, **SMALL).plan(query, key, value, AttentionCall(GRID)).attend(query, key, value)
    dense = F.scaled_dot_product_attention(query, key, value)
    assert ((output - dense).norm(dim=(2, 3)) < 0.2 * dense.norm(dim=(2, 3))).all()


def test_the_tail_is_taken_only_where_it_helps_and_can_be_turned_off():
    query, key, value = random_qkv(GRID)
    key[:, :2] *= 0.05  # nearly uniform attention: the mean of a skipped block is what dense attention sees of it
    plan = Adaptive(density=0.1, **SMALL).plan(query, key, value, AttentionCall(GRID))
    assert plan.tail[0, :2].all()
    assert Adaptive(density=0.1, tail=False, **SMALL).plan(query, key, value, AttentionCall(GRID)).tail is None


@pytest.mark.parametrize("rule", ["impact", "top"])
@pytest.mark.parametrize("tail", [False, True])
def test_padded_text_does_not_matter_to_the_choice_of_blocks(rule, tail):
    grid = TokenGrid(3, 8, 8, text_after=40)
    query, key, value = random_qkv(grid, batch=2)
    query = query.abs()
    # Of the first element one block holds keys that exist and keys that don't, which all queries would want.
    length = torch.tensor([202, 232], dtype=torch.int32)
    candidates = tuple(candidate(order, rule) for order in ("frame-major", "tiles"))
    options = Adaptive(density=0.5, candidates=candidates, tail=tail, **SMALL)
    mask = options.plan(query, key, value, AttentionCall(grid, key_length=length)).mask
    key[0, :, 202:], value[0, :, 202:] = 50.0, -50.0
    changed = options.plan(query, key, value, AttentionCall(grid, key_length=length)).mask
    assert torch.equal(mask.bits, changed.bits)


def test_half_precision_plans_like_single():
    qkv = random_qkv(GRID)
    halves = [x.bfloat16() for x in qkv]
    single = Adaptive(**SMALL).plan(*(x.float() for x in halves), AttentionCall(GRID))
    half = Adaptive(**SMALL).plan(*halves, AttentionCall(GRID))
    assert torch.equal(single.classes, half.classes)


@pytest.mark.parametrize("candidates", [CANDIDATES, *((candidate("tiles", rule),) for rule in ("top", "random"))])
def test_heads_judged_a_few_at_a_time_get_the_same_plan(candidates, monkeypatch):
    qkv = random_qkv(GRID, batch=2)
    together = Adaptive(candidates=candidates, **SMALL).plan(*qkv, AttentionCall(GRID))
    monkeypatch.setattr("diffsparse.strategies.planning_memory.PLANNING_BYTES", 1)
    apart = Adaptive(candidates=candidates, **SMALL).plan(*qkv, AttentionCall(GRID))
    assert are_the_same(together, apart)


class NoNumbers(NoWaiting):
    """Refuses tensors of Python's numbers too, whose copies to a GPU wait."""

    WAITING = (*NoWaiting.WAITING, "lift_fresh")


@pytest.mark.parametrize("grid", [GRID, TokenGrid(3, 5, 7, 2, 9)])
def test_a_second_layer_is_planned_without_waiting_for_the_device(grid):
    call = AttentionCall(grid, progress=0.3)
    Adaptive(**SMALL).plan(*random_qkv(grid), call)
    with NoNumbers():
        Adaptive(**SMALL).plan(*random_qkv(grid), call).mask.lists()


def test_plans_of_all_densities_share_what_depends_on_the_grid_alone():
    geometry_of.cache_clear()
    for density in (0.1, 0.2, 0.6):
        for progress in (None, 0.1, 0.9):
            Adaptive(density=density, **SMALL).plan(*random_qkv(GRID), AttentionCall(GRID, progress=progress))
    assert geometry_of.cache_info().misses == 1

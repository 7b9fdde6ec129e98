from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from pretended_gpu import GPU, PretendedGPU
from torch import Tensor

from diffsparse import heads
from diffsparse.grid import TokenGrid
from diffsparse.heads import BlockSums, head_errors, sample_rows
from diffsparse.kernels.pooling import block_means


def attention_by_elements(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention of scaled query [..., R, D] over the keys where seen [..., R, S]."""
    scores = (query.double() @ key.double().transpose(-1, -2)).masked_fill(~seen, -torch.inf)
    return torch.softmax(scores, -1) @ value.double()


@pytest.fixture
def case():
    """Rows and keys of 105 tokens in blocks of 16 (the last one ragged), and a random block map."""
    torch.manual_seed(0)
    rows, key, value = (torch.randn(2, 3, n, 8) for n in (5, 105, 105))
    visible = torch.rand(2, 3, 5, 7) < 0.4
    visible[..., 2] = True
    return rows, key, value, visible, BlockSums.of(rows, key, value, 16)


def test_rows_are_sampled_whatever_the_default_device_is():
    grid = TokenGrid(3, 5, 7)
    with torch.device("meta"):
        rows = sample_rows(grid, 9)
    assert torch.equal(rows, sample_rows(grid, 9))


def test_exact_is_dense_attention(case):
    rows, key, value, _, sums = case
    everything = torch.ones(2, 3, 5, 105, dtype=torch.bool)
    expected = attention_by_elements(rows, key, value, everything)
    assert torch.allclose(sums.exact().double(), expected, atol=1e-5)


def test_mass_is_what_the_weights_of_each_block_sum_to(case):
    rows, key, _, _, sums = case
    in_block = F.one_hot(torch.arange(105) // 16).double()  # [S, K]
    weights = torch.softmax(rows.double() @ key.double().transpose(-1, -2), -1)
    assert torch.allclose(sums.mass().double(), weights @ in_block, atol=1e-5)


def test_masked_is_attention_to_the_visible_blocks(case):
    rows, key, value, visible, sums = case
    seen = visible[..., torch.arange(105) // 16]
    expected = attention_by_elements(rows, key, value, seen)
    assert torch.allclose(sums.masked(visible)[0].double(), expected, atol=1e-5)


def test_the_tail_stands_for_each_hidden_block_as_often_as_it_has_tokens(case):
    rows, key, value, visible, sums = case
    # Hidden tokens replaced by the mean of their block: attention over them is the pooled tail.
    block = torch.arange(105) // 16
    mean_key, mean_value = (block_means(x, 16)[0][:, :, block] for x in (key, value))
    seen = visible[..., block]  # [B, H, R, S]
    rows_of = rows[:, :, :, None]  # one query a row, each with keys of its own
    keys = torch.where(seen[..., None], key[:, :, None], mean_key[:, :, None])
    values = torch.where(seen[..., None], value[:, :, None], mean_value[:, :, None])
    everything = torch.ones(2, 3, 5, 1, 105, dtype=torch.bool)
    expected = attention_by_elements(rows_of, keys, values, everything)[:, :, :, 0]
    assert torch.allclose(sums.masked(visible)[1].double(), expected, atol=1e-5)


@pytest.mark.parametrize("height", [100.0, 1000.0])
def test_a_mask_that_hides_the_largest_scores_leaves_the_numbers_of_the_others(height):
    torch.manual_seed(0)
    rows, key, value = (torch.randn(1, 2, n, 8) for n in (5, 105, 105))
    # The first block's scores lie so far above all others that these are nothing beside them in float32.
    rows[..., 0] = 1.0
    key[:, :, :16, 0] += height
    visible = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    visible[..., 0] = False
    sums = BlockSums.of(rows, key, value, 16)
    seen = (torch.arange(105) >= 16).expand(1, 2, 5, 105)
    without_tail, with_tail = sums.masked(visible)
    expected = attention_by_elements(rows, key, value, seen)
    assert torch.allclose(without_tail.double(), expected, atol=1e-5)
    pooled = value[:, :, :16].mean(2, keepdim=True).expand(1, 2, 5, 8)
    assert torch.allclose(with_tail, pooled, atol=1e-5)


def test_a_row_that_sees_no_key_is_infinitely_wrong_without_the_tail(case):
    _, _, _, visible, sums = case
    visible[:, 1, 3] = False
    without_tail, with_tail = (head_errors(output, sums.exact()) for output in sums.masked(visible))
    assert without_tail.isinf().tolist() == [False, True, False]
    assert with_tail.isfinite().all()


def test_errors_are_those_of_each_mask_on_its_own(case):
    _, _, _, _, sums = case
    rank = torch.rand(2, 3, 5, 2, 7).argsort(-1).int()
    always = torch.rand(5, 7) < 0.2
    limits = [0, 2, 5, 8]
    errors, sizes = sums.errors(rank, always, torch.tensor(limits))
    assert errors.shape == (3, 2, 2, 3)
    assert torch.allclose(sizes, sums.exact().square().sum((0, 2, 3)))
    for rule in range(2):
        for number, limit in enumerate(limits[:-1]):
            outputs = sums.masked((rank[:, :, :, rule] < limit) | always)
            expected = torch.stack([head_errors(output, sums.exact()) for output in outputs], dim=1)
            assert torch.allclose(errors[:, :, rule, number], expected, atol=1e-6)


def test_an_order_gives_what_keys_and_values_in_it_give(case):
    rows, key, value, _, _ = case
    order, length = torch.randperm(105), torch.tensor([105, 90], dtype=torch.int32)
    sums = BlockSums.of(rows, key, value, 16, order, length)
    expected = BlockSums.of(rows, key[:, :, order], value[:, :, order], 16, key_length=length)
    for name, x in vars(expected).items():
        assert torch.allclose(getattr(sums, name), x, atol=1e-5), name


def test_keys_beyond_the_length_do_not_exist():
    torch.manual_seed(0)
    rows, key, value = (torch.randn(2, 3, n, 8) for n in (5, 105, 105))
    length = torch.tensor([105, 90], dtype=torch.int32)
    key[1, :, 90:] = 1e4  # what padding holds must not matter
    sums = BlockSums.of(rows, key, value, 16, key_length=length)
    seen = (torch.arange(105) < length[:, None])[:, None, None].expand(2, 3, 5, 105)
    expected = attention_by_elements(rows, key, value, seen)
    assert torch.allclose(sums.exact().double(), expected, atol=1e-5)


def test_errors_are_relative_and_by_head():
    exact = torch.ones(2, 2, 5, 8)
    output = exact.clone()
    output[:, 1] *= 1.1
    assert torch.allclose(head_errors(output, exact), torch.tensor([0.0, 0.01]))
    output[0, 0, 0, 0] = torch.nan
    assert head_errors(output, exact)[0] == torch.inf


@pytest.mark.parametrize("count", [1, 10, 64, 1000])
def test_sampled_rows_are_video_tokens_spread_over_the_video(count):
    grid = TokenGrid(3, 5, 7, text_before=4, text_after=9)
    rows = sample_rows(grid, count, seed=1)
    assert len(rows) == min(count, 105)
    assert len(rows.unique()) == len(rows)
    assert rows.min() >= 4
    assert rows.max() < 109
    assert (rows.diff() < 2 * 105 / len(rows) + 1).all()


def test_sampled_rows_depend_on_the_seed_alone():
    grid = TokenGrid(3, 5, 7)
    assert torch.equal(sample_rows(grid, 10, seed=1), sample_rows(grid, 10, seed=1))
    assert not torch.equal(sample_rows(grid, 10, seed=1), sample_rows(grid, 10, seed=2))


@pytest.fixture
def stand_in(monkeypatch):
    """In place of both of the GPU's kernels, right, and for float32 alone."""

    def block_sums(query, key, value, block_size, order):
        assert {x.dtype for x in (query, key, value)} == {torch.float32}
        return vars(BlockSums.of(query, key, value, block_size, order)).values()

    def mask_errors(numerators, denominators, peaks, tail, mean_value, *masks):
        assert numerators.dtype == torch.float32
        errors, sizes = BlockSums(numerators, denominators, peaks, tail, mean_value, mean_value)._errors(*masks)
        # Of the mask that shows all blocks too; of a row that sees no key the kernel gives NaN.
        errors = F.pad(errors.masked_fill(errors.isinf(), torch.nan), (0, 1))
        return errors * sizes[:, None, None, None], sizes

    module = types.SimpleNamespace(block_sums=block_sums, mask_errors=mask_errors)
    for name in ("block_sums_triton", "mask_errors_triton"):
        monkeypatch.setitem(sys.modules, f"diffsparse.kernels.{name}", module)
    with PretendedGPU():
        yield module


@pytest.mark.parametrize("find", [heads._kernels, heads._error_kernels])
def test_trying_a_kernel_draws_no_numbers_that_a_video_is_made_of(find, stand_in):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert find.__wrapped__(GPU) is stand_in
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("find", [heads._kernels, heads._error_kernels])
def test_a_kernel_is_tried_in_float32_whatever_the_default_is(find, stand_in):
    torch.set_default_dtype(torch.float64)
    try:
        assert find.__wrapped__(GPU) is stand_in
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("wrong", [field.name for field in dataclasses.fields(BlockSums)])
def test_a_kernel_with_one_wrong_sum_is_left_out(wrong, stand_in, monkeypatch):
    def off(*args):
        return [x + 0.1 * (name == wrong) for name, x in vars(BlockSums.of(*args)).items()]

    monkeypatch.setattr(stand_in, "block_sums", off)
    with pytest.warns(UserWarning, match="judging candidate masks is left out"):
        assert heads._kernels.__wrapped__(GPU) is None


@pytest.mark.parametrize("wrong", ["without tail", "with tail", "sizes", "a rule", "a limit"])
def test_a_kernel_with_wrong_errors_is_left_out(wrong, stand_in, monkeypatch):
    def off(*args, right=stand_in.mask_errors):
        squares, sizes = right(*args)
        part = {
            "without tail": squares[:, 0],
            "with tail": squares[:, 1],
            "sizes": sizes,
            "a rule": squares[:, :, 1],
            "a limit": squares[..., 2],
        }[wrong]
        part.mul_(1.01)
        return squares, sizes

    monkeypatch.setattr(stand_in, "mask_errors", off)
    with pytest.warns(UserWarning, match="errors of candidate masks is left out"):
        assert heads._error_kernels.__wrapped__(GPU) is None


@pytest.mark.parametrize("missing", ["_kernels", "_error_kernels"])
def test_masks_are_judged_in_kernels_where_there_are_both(missing, monkeypatch):
    # Those that sum take so many rows, numbers a head, tokens a block and bytes a number, and one size alone.
    kernels = types.SimpleNamespace(fits=lambda *sizes: sizes == (64, 8, 16, 4))
    for name in ("_kernels", "_error_kernels"):
        monkeypatch.setattr(heads, name, lambda device: kernels)
    key = torch.zeros(1, 2, 105, 8)
    assert heads.judged_in_kernels(key, 64, 16)
    assert not heads.judged_in_kernels(key, 64, 32)
    monkeypatch.setattr(heads, missing, lambda device: None)
    assert not heads.judged_in_kernels(key, 64, 16)

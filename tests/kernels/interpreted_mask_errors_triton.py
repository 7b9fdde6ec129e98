"""The kernel of the masks' errors in Triton's interpreter; run by `test_mask_errors_triton.py` in its own process."""

from __future__ import annotations

import warnings

import pytest
import torch
import triton
from pretended_gpu import GPU, PretendedGPU

from diffsparse import heads
from diffsparse.grid import TokenGrid
from diffsparse.heads import BlockSums
from diffsparse.kernels import block_sums_triton, mask_errors_triton
from diffsparse.strategies.adaptive import Adaptive
from diffsparse.strategies.strategy import AttentionCall

assert triton.knobs.runtime.interpret, "run this file with TRITON_INTERPRET=1"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sums_of(blocks, dim, lengths=None):
    """Sums of 3 rows of 2 x 2 heads by key blocks of 4 tokens, the last one ragged."""
    query, key, value = (torch.randn(2, 2, n, dim) for n in (3, 4 * blocks - 1, 4 * blocks - 1))
    key_length = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    return BlockSums.of(query, key, value, 4, key_length=key_length)


def masks_of(blocks, rules, limits, batch=2, num_heads=2):
    """Any order by each rule, with all blocks beyond the largest limit in one place; the first row has no `always`."""
    rank = torch.rand(batch, num_heads, 3, rules, blocks).argsort(-1).int()
    always = torch.rand(3, blocks) < 0.1
    always[0] = False
    return rank.where(rank < max(limits), blocks), always, torch.tensor([*limits, blocks + 1])


def check(sums, masks):
    """Held to PyTorch in float64, with ten times what PyTorch itself is off in float32."""
    of_torch = sums._errors(*masks)
    exact = BlockSums(*(x.double() for x in vars(sums).values()))._errors(*masks)
    actual = sums._errors_in(mask_errors_triton, *masks)
    for of_kernel, expected, right in zip(actual, of_torch, exact, strict=True):
        assert (of_kernel.shape, of_kernel.dtype) == (expected.shape, torch.float32)
        assert torch.equal(of_kernel.isinf(), right.isinf())
        own_error = (expected - right).nan_to_num(nan=0.0).abs().max().item()
        torch.testing.assert_close(of_kernel.double(), right, rtol=1e-6, atol=10 * own_error + 1e-7)


# Masks that fill 16 rows of a product or don't, and that take 32; blocks and heads that fill their tiles or don't.
@pytest.mark.parametrize(
    ("rules", "limits", "blocks", "dim"),
    [
        (1, (2,), 9, 20),
        (2, (1, 2, 3, 4, 6), 67, 80),
        (2, (1, 2, 3, 4, 5, 6, 7), 16, 64),
        (3, (1, 2, 3, 4, 6), 64, 32),
    ],
)
def test_errors_are_those_of_torch(rules, limits, blocks, dim):
    check(sums_of(blocks, dim), masks_of(blocks, rules, limits))


@pytest.mark.parametrize("dim", [8, 32, 96, 256])
def test_heads_may_be_of_any_size(dim):
    check(sums_of(18, dim), masks_of(18, 1, (3, 9)))


@pytest.mark.parametrize(("batch", "num_heads"), [(1, 1), (1, 2), (2, 1)])
def test_ranks_may_be_shared_and_lie_anywhere(batch, num_heads):
    sums, (rank, *others) = sums_of(9, 16), masks_of(9, 2, (2, 5), batch, num_heads)
    check(sums, (rank, *others))
    expected = sums._errors_in(mask_errors_triton, rank, *others)
    for axes in ((3, 2, 1, 0, 4), (4, 3, 2, 1, 0)):
        elsewhere = rank.permute(axes).contiguous().permute(axes)
        for of_this, of_those in zip(sums._errors_in(mask_errors_triton, elsewhere, *others), expected, strict=True):
            assert torch.equal(of_this, of_those)


def test_a_row_that_sees_no_key_is_infinitely_wrong_without_the_tail():
    sums, masks = sums_of(20, 16), masks_of(20, 2, (0, 3))
    check(sums, masks)
    without_tail, with_tail = sums._errors_in(mask_errors_triton, *masks)[0].unbind(1)
    assert without_tail.isinf().flatten(0, 1).unique(dim=0).tolist() == [[True, False]]
    assert with_tail.isfinite().all()


def test_blocks_that_do_not_exist_are_no_keys():
    # Of the second batch element two of nine blocks exist, and a mask may show only others.
    sums, (rank, always, limits) = sums_of(9, 16, [35, 8]), masks_of(9, 1, (1, 7))
    rank[1, 0] = torch.arange(8, -1, -1)
    always[:] = False
    check(sums, (rank, always, limits))
    assert sums._errors_in(mask_errors_triton, rank, always, limits)[0][0, 0].isinf().all()


@pytest.mark.parametrize("height", [100.0, 1000.0])
def test_a_mask_that_hides_the_largest_scores_leaves_the_numbers_of_the_others(height):
    # In float32 the weights of all other blocks are nothing beside that of the first.
    query, key, value = (torch.randn(2, 2, n, 16) for n in (3, 71, 71))
    query[..., 0] = 1.0
    key[:, :, :4, 0] += height
    rank = torch.arange(17, -1, -1, dtype=torch.int32).expand(1, 1, 3, 1, 18)
    masks = rank, torch.zeros(3, 18, dtype=torch.bool), torch.tensor([1, 17, 19])
    check(BlockSums.of(query, key, value, 4), masks)


def test_all_scores_may_lie_far_below_zero():
    query, key, value = (torch.randn(2, 2, n, 16) for n in (3, 71, 71))
    query[..., 0] = 1.0
    key[..., 0] -= 1000.0
    check(BlockSums.of(query, key, value, 4), masks_of(18, 1, (3, 9)))


@pytest.fixture
def _kernels_judge(monkeypatch):
    monkeypatch.setattr(heads, "_kernels", lambda device: block_sums_triton)
    monkeypatch.setattr(heads, "_error_kernels", lambda device: mask_errors_triton)


@pytest.mark.parametrize("grid", [TokenGrid(3, 5, 7), TokenGrid(3, 5, 7, 2, 9)])
def test_a_plan_is_that_of_torch(grid, request):
    adaptive = Adaptive(query_block_size=16, key_block_size=16, sampled_rows=4)
    qkv = [torch.randn(1, 2, grid.num_tokens, 16) for _ in range(3)]
    expected = adaptive.plan(*qkv, AttentionCall(grid))
    request.getfixturevalue("_kernels_judge")
    plan = adaptive.plan(*qkv, AttentionCall(grid))
    assert torch.equal(plan.mask.bits, expected.mask.bits)
    assert torch.equal(plan.permutation.order, expected.permutation.order)
    assert torch.equal(plan.tail, expected.tail)


def test_a_kernel_that_is_right_is_used():
    with warnings.catch_warnings(), PretendedGPU():
        warnings.simplefilter("error", UserWarning)  # NumPy warns of a row that sees no key
        assert heads._error_kernels.__wrapped__(GPU) is mask_errors_triton

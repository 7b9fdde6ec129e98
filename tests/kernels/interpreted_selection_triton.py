"""The kernel that chooses key blocks in Triton's interpreter; run by `test_selection_triton.py`, in its own process."""

from __future__ import annotations

import warnings

import pytest
import torch
import triton
from pretended_gpu import GPU, PretendedGPU

from diffsparse.kernels import selection_triton
from diffsparse.strategies import select_blocks as choosing
from diffsparse.strategies.select_blocks import select_blocks

assert triton.knobs.runtime.interpret, "run this file with TRITON_INTERPRET=1"

LARGEST = torch.finfo(torch.float32).max
SMALLEST = 1e-45  # a denormal


def inputs_for(num_blocks, counts, batch=1, heads=1):
    """Rows of their own kind, of whose blocks some are always seen; in the last two rows all of them, and none."""
    scores = torch.randn(batch, heads, 9, num_blocks)
    scores[:, :, 0] = scores[:, :, 0].mul(2).round().div(2)  # many equal ones, both zeros
    scores[:, :, 1] = torch.nan
    scores[:, :, 2, ::3], scores[:, :, 2, 1::3] = torch.nan, torch.inf
    scores[:, :, 3, ::2] = -torch.inf
    values = torch.tensor([-0.0, 0.0, SMALLEST, -SMALLEST, LARGEST, -LARGEST])
    scores[:, :, 4] = values[torch.randint(len(values), scores[:, :, 4].shape)]
    scores[:, :, 5, ::2] = -scores[:, :, 1, ::2]  # NaN with the other sign
    scores[:, :, 6] = -7.5
    always = torch.rand(9, num_blocks) < 0.1
    always[7], always[8] = True, False
    return scores, torch.tensor(counts), always


def chosen(scores, counts, always):
    """By the specification."""
    num_blocks = always.shape[1]
    return select_blocks(scores, counts, always, len(always) * num_blocks, num_blocks, len(always))


def assert_same(actual, expected):
    for a, e in zip(actual, (expected.bits, expected.counts), strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        assert torch.equal(a, e)


# Around a byte, several bytes, one pass of the kernel and three.
@pytest.mark.parametrize(
    ("num_blocks", "counts"), [(1, [1]), (8, [3, 7, 8]), (9, [0, 4, 20]), (65, [1, 20]), (512, [150]), (1100, [1040])]
)
def test_it_chooses_what_torch_chooses(num_blocks, counts):
    inputs = inputs_for(num_blocks, counts)
    assert_same(selection_triton.select_blocks(*inputs), chosen(*inputs))


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_scores_counts_and_always_may_be_shared_and_lie_anywhere(batch, heads):
    scores, _, always = (x[..., :2, :] if x.ndim > 1 else x for x in inputs_for(9, [1], batch, heads))
    counts = torch.tensor([1, 4, 7], dtype=torch.int32)
    expected = chosen(scores, counts, always)
    scores = scores.transpose(2, 3).contiguous().transpose(2, 3)
    anywhere = scores, counts.repeat_interleave(2)[::2], always.T.contiguous().T
    assert_same(selection_triton.select_blocks(*anywhere), expected)


def pretend(monkeypatch):
    """The first use of the kernel on a GPU, whatever the device."""
    first_use = choosing._kernels.__wrapped__
    monkeypatch.setattr(choosing, "_kernels", lambda device: first_use(GPU))


def test_a_kernel_that_is_right_is_used(monkeypatch):
    inputs = inputs_for(9, [4])
    expected = chosen(*inputs)
    pretend(monkeypatch)
    with warnings.catch_warnings(), PretendedGPU():
        warnings.simplefilter("error")
        assert choosing._kernels(torch.device("cpu")) is selection_triton
        mask = chosen(*inputs)
    assert_same((mask.bits, mask.counts), expected)


@pytest.mark.parametrize(("output", "place"), [(0, 0), (0, 200), (0, -1), (1, 0), (1, -1)])
def test_torch_takes_over_from_a_kernel_that_is_wrong(output, place, monkeypatch):
    right = selection_triton.select_blocks

    def wrong(*inputs):
        result = right(*inputs)
        result[output].view(-1)[place] += 1
        return result

    inputs = inputs_for(9, [1, 4, 7])
    expected = chosen(*inputs)
    monkeypatch.setattr(selection_triton, "select_blocks", wrong)
    pretend(monkeypatch)
    with pytest.warns(UserWarning, match="choosing key blocks is left out.*wrong on a small input"), PretendedGPU():
        mask = chosen(*inputs)
    assert_same((mask.bits, mask.counts), expected)

from __future__ import annotations

import pytest
import torch

from diffsparse.eval.random_attention import error_of_sampled_rows, random_inputs, random_lists, sparse_call
from diffsparse.kernels.block_sparse import check_lists

CPU = torch.device("cpu")


@pytest.mark.parametrize("raggedness", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("density", [0.1, 0.25, 0.8, 1.0])
def test_lists_have_about_the_density_and_are_as_ragged_as_asked(density, raggedness):
    torch.manual_seed(0)
    key_blocks, counts = random_lists(4096, 8, density, CPU, (64, 32), raggedness)
    check_lists(key_blocks, counts, 128)
    assert counts.shape == (1, 8, 64)
    # Four standard deviations of the mean of 512 counts between 0 and twice theirs; without that, rounding.
    mean = density * 128
    assert float(counts.float().mean()) == pytest.approx(mean, rel=0.1 if raggedness else 0.05)
    furthest = min(raggedness, 1 / density - 1) * mean
    assert int((counts - mean).abs().max()) <= furthest + 1
    assert (counts.unique().numel() > 1) == (furthest > 0)


def test_lists_ascend():
    key_blocks, counts = random_lists(2560, 2, 0.5, CPU)
    for blocks, count in zip(key_blocks.flatten(0, 2).tolist(), counts.flatten().tolist()):
        assert blocks[:count] == sorted(set(blocks[:count]))


@pytest.mark.parametrize("key_block_size", [64, 128])
@pytest.mark.parametrize("tail", [False, True])
def test_nothing_is_off_in_blocks_of_either_size(key_block_size, tail):
    # The last block is not whole, and smaller than half of 128.
    inputs = random_inputs(144, 2, 16, CPU)
    blocks = 128, key_block_size
    lists = random_lists(144, 2, 0.5, CPU, blocks)
    output = sparse_call(*inputs, *lists, blocks, tail=tail)()
    assert error_of_sampled_rows(*inputs, *lists, output, tail, key_block_size) < 1e-6


class OnMPS(torch.Tensor):
    """Says that it is on Apple's GPU, and refuses what that has not."""

    device = torch.device("mps", 0)

    def double(self):
        raise TypeError("the MPS framework doesn't support float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("tail", [False, True])
def test_a_device_without_float64_will_do(tail):
    inputs, lists = random_inputs(144, 2, 16, CPU), random_lists(144, 2, 0.5, CPU)
    output = sparse_call(*inputs, *lists, tail=tail)()
    on_mps = [x.as_subclass(OnMPS) for x in (*inputs, *lists, output)]
    assert error_of_sampled_rows(*on_mps, tail) < 1e-6

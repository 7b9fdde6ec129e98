"""The kernels of `lists_triton.py` in Triton's interpreter; run by `test_lists_triton.py` in a process of its own."""

from __future__ import annotations

import warnings

import pytest
import torch
import triton
from pretended_gpu import GPU, PretendedGPU

from diffsparse import block_mask
from diffsparse.block_mask import BlockMask
from diffsparse.kernels import lists_triton, pooling
from diffsparse.packed_bits import pack_bits

assert triton.knobs.runtime.interpret, "run this file with TRITON_INTERPRET=1"

LARGEST = torch.iinfo(torch.int32).max
# Around a byte, several bytes, a pass of the kernel and more passes.
NUMBERS_OF_BLOCKS = [1, 7, 8, 9, 65, 130, 1024, 1025, 2100]


def visible_of(num_blocks, *shape):
    """At random; but the first rows see all, the first, the last, and nothing."""
    visible = torch.rand(*shape, num_blocks) < 0.4
    visible[..., 0, :] = True
    visible[..., 1:4, :] = False
    visible[..., 1, 0] = visible[..., 2, -1] = True
    return visible


@pytest.mark.parametrize("num_blocks", NUMBERS_OF_BLOCKS)
@pytest.mark.parametrize("leading", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_lists_are_what_torch_lists(num_blocks, leading):
    visible = visible_of(num_blocks, *leading, 5)
    mask = BlockMask.from_visible(visible, 5 * num_blocks, num_blocks, 5)
    lists = lists_triton.lists_of(mask.bits, num_blocks)
    expected = mask.lists()
    assert (lists.dtype, lists.shape) == (expected.dtype, expected.shape)
    assert torch.equal(lists, expected)
    # Rows that see nothing too, which no mask has.
    for row, seen in zip(lists_triton.lists_of(pack_bits(visible), num_blocks).flatten(0, 2), visible.flatten(0, 2)):
        blocks = seen.nonzero()[:, 0].tolist()
        assert row.tolist() == blocks + [0] * (num_blocks - len(blocks))


@pytest.mark.parametrize("num_blocks", [9, 65])
def test_bits_may_lie_anywhere_and_those_beyond_the_last_block_are_not_read(num_blocks):
    visible = visible_of(num_blocks, 1, 1, 5)
    bits = pack_bits(visible)
    bits[..., -1] |= 0xFF << num_blocks % 8 & 0xFF
    everywhere = torch.full((2, 3, 5, 2 * bits.shape[-1]), 0xFF, dtype=torch.uint8)
    everywhere[..., ::2] = bits
    expected = lists_triton.lists_of(pack_bits(visible), num_blocks).expand(2, 3, -1, -1)
    assert torch.equal(lists_triton.lists_of(everywhere[..., ::2], num_blocks), expected)
    assert torch.equal(lists_triton.lists_of(bits.expand(2, 3, -1, -1), num_blocks), expected)


def lists_for(num_blocks, capacity, batch, heads):
    """Blocks in any order, nonsense after the counts. The first query block lists all that it can, the second one."""
    counts = torch.randint(1, capacity + 1, (batch, heads, 3), dtype=torch.int32)
    counts[..., 0], counts[..., 1] = capacity, 1
    key_blocks = torch.rand(batch, heads, 3, num_blocks).argsort(-1)[..., :capacity].int()
    beyond = torch.arange(capacity) >= counts[..., None]
    return key_blocks.masked_fill(beyond, LARGEST).where(~beyond | (torch.arange(capacity) % 2 == 0), -7), counts


@pytest.mark.parametrize("num_blocks", NUMBERS_OF_BLOCKS)
@pytest.mark.parametrize("has_lengths", [False, True])
@pytest.mark.parametrize("is_ragged", [False, True])
def test_logarithms_are_those_of_torch(num_blocks, has_lengths, is_ragged):
    num_keys = 16 * num_blocks - 3 * is_ragged
    # Nothing; within a block, at its edge, in the last block, at the end, beyond it.
    lengths = [0, 8 * num_blocks + 3, num_blocks // 2 * 16, num_keys - 1, num_keys, LARGEST]
    key_length = torch.tensor(lengths, dtype=torch.int32) if has_lengths else None
    capacities = num_blocks, max(num_blocks // 3, 1)
    for capacity, num_padded in zip(capacities, (num_blocks + 1, (num_blocks // 128 + 1) * 128)):
        inputs = *lists_for(num_blocks, capacity, len(lengths), 1), num_keys, 16, key_length, num_padded
        logs = lists_triton.tail_logs(*inputs)
        assert (logs.dtype, logs.is_contiguous()) == (torch.float32, True)
        torch.testing.assert_close(logs, pooling.tail_logs(*inputs), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 1)])
@pytest.mark.parametrize("lengths", [None, (700, 1000)])
def test_lists_and_counts_may_be_shared_and_lie_anywhere(batch, heads, lengths):
    key_blocks, counts = lists_for(9, 9, batch, heads)
    key_blocks = key_blocks.transpose(2, 3).contiguous().transpose(2, 3)
    shared = key_blocks.expand(2, 3, -1, -1), counts.expand(2, 3, -1)
    key_length = None if lengths is None else torch.tensor(lengths, dtype=torch.int32).repeat_interleave(2)[::2]
    others = 1100, 128, key_length, 128
    expected = pooling.tail_logs(*shared, *others)
    torch.testing.assert_close(lists_triton.tail_logs(*shared, *others), expected, rtol=0.0, atol=1e-6)
    # Only one of the two shared.
    both = shared[0].contiguous(), shared[1]
    torch.testing.assert_close(lists_triton.tail_logs(*both, *others), expected, rtol=0.0, atol=1e-6)


FIRST_USES = [(block_mask, "lists_of", "listing key blocks"), (pooling, "tail_logs", "sizes of the pooled tail")]


def pretend(monkeypatch, module):
    """The first use of a kernel on a GPU, whatever the device."""
    first_use = module._kernels.__wrapped__
    monkeypatch.setattr(module, "_kernels", lambda device: first_use(GPU))


@pytest.mark.parametrize("module", [block_mask, pooling])
def test_kernels_that_are_right_are_used(module, monkeypatch):
    pretend(monkeypatch, module)
    with warnings.catch_warnings(), PretendedGPU():
        warnings.simplefilter("error")
        assert module._kernels(torch.device("cpu")) is lists_triton


@pytest.mark.parametrize("place", [0, 3000, -1])
@pytest.mark.parametrize(("module", "kernel", "what"), FIRST_USES)
def test_torch_takes_over_from_a_kernel_that_is_wrong(module, kernel, what, place, monkeypatch):
    right = getattr(lists_triton, kernel)

    def wrong(*inputs):
        result = right(*inputs)
        result.view(-1)[place] = 1 - result.view(-1)[place].clamp(min=0)
        return result

    mask = BlockMask.from_visible(visible_of(9, 2, 3, 5), 65, 16, 8)
    inputs = *lists_for(9, 9, 2, 3), 65, 8, None, 16
    expected = mask.lists() if module is block_mask else pooling.tail_logs(*inputs)
    monkeypatch.setattr(lists_triton, kernel, wrong)
    pretend(monkeypatch, module)
    with pytest.warns(UserWarning, match=f"{what} is left out.*wrong on a small input"), PretendedGPU():
        actual = mask.lists() if module is block_mask else pooling.tail_logs(*inputs)
    assert torch.equal(actual, expected)

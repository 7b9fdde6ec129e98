from __future__ import annotations

import pytest
import torch

from diffsparse.packed_bits import count_bits, pack_bits, unpack_bits


@pytest.mark.parametrize("size", [1, 7, 8, 9, 65])
def test_packed_bits_come_back_and_are_counted(size):
    bits = torch.rand(3, 5, size, generator=torch.Generator().manual_seed(0)) < 0.4
    packed = pack_bits(bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (3, 5, -(-size // 8)))
    assert torch.equal(unpack_bits(packed, size), bits)
    assert torch.equal(count_bits(packed), bits.sum(-1))


def test_the_first_bit_is_the_lowest():
    assert pack_bits(torch.tensor([True, False, False, True, False, False, False, False, True])).tolist() == [9, 1]


def test_every_byte_is_counted_right():
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    assert count_bits(every).tolist() == [bin(byte).count("1") for byte in range(256)]

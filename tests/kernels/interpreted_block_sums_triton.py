"""The kernel of the block sums in Triton's interpreter; run by `test_block_sums_triton.py` in a process of its own."""

from __future__ import annotations

import pytest
import torch
import triton

from diffsparse.heads import BlockSums
from diffsparse.kernels.block_sums_triton import block_sums

assert triton.knobs.runtime.interpret, "run this file with TRITON_INTERPRET=1"


@pytest.mark.parametrize(("rows", "dim", "block_size"), [(5, 32, 16), (16, 20, 12), (64, 64, 64)])
@pytest.mark.parametrize("lengths", [None, [70, 20]])
@pytest.mark.parametrize("ordered", [False, True])
def test_it_gives_the_fields_that_torch_gives(rows, dim, block_size, lengths, ordered):
    torch.manual_seed(0)
    query = torch.randn(2, 3, rows, dim)
    key, value = (torch.randn(2, 70, 3, dim).transpose(1, 2) for _ in range(2))
    length = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    order = torch.randperm(70) if ordered else None
    expected = BlockSums.of(query, key, value, block_size, order, length)
    actual = BlockSums(*block_sums(query, key, value, block_size, order, length))
    for name, x in vars(expected).items():
        torch.testing.assert_close(getattr(actual, name), x, rtol=1e-4, atol=1e-5)


def test_lengths_and_orders_may_be_views():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 5, 32), *torch.randn(2, 2, 3, 70, 32)
    # All batch entries share a length; the order is a column.
    length = torch.tensor([40], dtype=torch.int32).expand(2)
    order = torch.stack([torch.randperm(70) for _ in range(2)], dim=1)[:, 0]
    expected = BlockSums.of(query, key, value, 16, order, length)
    actual = BlockSums(*block_sums(query, key, value, 16, order, length))
    for name, x in vars(expected).items():
        torch.testing.assert_close(getattr(actual, name), x, rtol=1e-4, atol=1e-5)

from __future__ import annotations

import heapq

import torch

from diffsparse.kernels.schedule import heavy_first


def test_heavy_rows_come_first_then_the_fullest_heads_and_of_each_the_fullest_rows():
    counts = torch.tensor([[[1, 2, 9, 3], [4, 6, 5, 5], [1, 1, 1, 1]], [[6, 1, 3, 2], [5, 4, 6, 5], [1, 1, 1, 8]]])
    order = heavy_first(counts.int())
    assert order.dtype == torch.int32
    # Rows 2 of the first head and 3 of the last; heads of 20 one after the other; then 15, 12, 11 and 4.
    assert order.tolist() == [2, 23, 5, 6, 7, 4, 18, 16, 19, 17, 3, 1, 0, 12, 14, 15, 13, 20, 21, 22, 8, 9, 10, 11]


def test_a_head_of_more_blocks_than_32_bits_count_is_the_fullest():
    counts = torch.tensor([1, 50_000]).int()[None, :, None].expand(1, 2, 50_000)
    assert heavy_first(counts)[[0, -1]].tolist() == [50_000, 49_999]


def test_equal_rows_keep_their_order():
    assert heavy_first(torch.full((2, 3, 5), 7).int()).tolist() == list(range(30))


def test_processors_that_take_rows_in_this_order_end_together():
    """24 heads of 132 rows, of which 4 see everything, on 132 processors: as an image of 16,384 tokens with text."""
    generator = torch.Generator().manual_seed(0)
    counts = (132 * torch.rand((1, 24, 1), generator=generator) / 2 * torch.ones(132)).ceil().int()
    counts[..., -4:] = 132
    least = counts.sum() / 132
    assert _time_taken(counts.flatten()) > 1.08 * least
    assert _time_taken(counts.flatten()[heavy_first(counts)]) < 1.02 * least


def _time_taken(counts):
    """When the last of 132 processors ends, each of which takes the next row when it is done with one."""
    ends = [0] * 132
    for count in counts.tolist():
        heapq.heapreplace(ends, ends[0] + count)
    return max(ends)

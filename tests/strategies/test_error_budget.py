from __future__ import annotations

import itertools

import pytest
import torch

from diffsparse.strategies.error_budget import share_out

COUNTS = [2, 3, 4, 6, 8]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_sharing_of_the_budget_has_a_smaller_error(seed):
    generator = torch.Generator().manual_seed(seed)
    # Convex curves: the steps take less and less off.
    falls = torch.rand(3, 4, generator=generator).sort(descending=True).values * torch.tensor([1, 1, 2, 2])
    errors = 10 - torch.cat([torch.zeros(3, 1), falls.cumsum(-1)], dim=-1)

    def error_at(counts: tuple[int, ...]) -> float:
        return sum(torch.tensor(_interpolated(curve.tolist(), count)).item() for curve, count in zip(errors, counts))

    best = min(error_at(each) for each in itertools.product(range(2, 9), repeat=3) if sum(each) == 12)
    counts = share_out(errors, COUNTS, 4)
    assert counts.sum() == 12
    assert error_at(tuple(counts.tolist())) == pytest.approx(best)


def _interpolated(curve: list[float], count: int) -> float:
    for (left, right), (low, high) in zip(itertools.pairwise(COUNTS), itertools.pairwise(curve)):
        if left <= count <= right:
            return low + (count - left) / (right - left) * (high - low)
    raise AssertionError(count)


def test_a_head_whose_error_falls_only_in_the_end_is_seen_through_its_flat_beginning():
    errors = torch.tensor([[9.0, 9.0, 9.0, 9.0, 0.0], [9.0, 8.9, 8.8, 8.7, 8.6]])
    assert share_out(errors, COUNTS, 5).tolist() == [8, 2]


def test_heads_alike_get_what_all_get_and_flat_ones_spend_the_budget_too():
    assert share_out(torch.zeros(3, 5), COUNTS, 4).sum() == 12
    assert share_out(torch.rand(3, 1), [4], 4).tolist() == [4, 4, 4]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_head_without_a_number_is_served_first_and_spoils_no_other(bad):
    errors = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0], [bad, bad, bad, bad, 1.0], [5.0, 5.0, 5.0, 5.0, 5.0]])
    assert share_out(errors, COUNTS, 4).tolist() == [2, 8, 2]

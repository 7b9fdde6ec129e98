from __future__ import annotations

import itertools

import pytest
import torch

from diffsparse.strategies.smallest_set import smallest_set


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_no_smaller_set_reaches_the_share(share):
    """Against all subsets of seven entries."""
    mass = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    kept = smallest_set(mass, share)
    for row, chosen in zip(mass.reshape(-1, 7), kept.reshape(-1, 7)):
        assert row[chosen].sum() >= share - 1e-6
        smaller = itertools.combinations(row.tolist(), int(chosen.sum()) - 1)
        assert max(map(sum, smaller)) < share


def test_what_is_always_kept_counts_first():
    mass = torch.tensor([0.5, 0.25, 0.125, 0.125])
    always = torch.tensor([False, False, False, True])
    assert smallest_set(mass, 0.625, always).tolist() == [True, False, False, True]
    assert smallest_set(mass, 0.75, always).tolist() == [True, True, False, True]
    assert smallest_set(mass, 0.1, always).tolist() == [False, False, False, True]
    assert smallest_set(mass, 0.1, torch.ones(4, dtype=torch.bool)).all()


def test_a_row_keeps_one_entry_at_least():
    assert smallest_set(torch.zeros(2, 3), 0.9).sum(-1).tolist() == [1, 1]
    assert smallest_set(torch.tensor([[0.2, 0.8]]), 0.0).tolist() == [[False, True]]


def test_rows_need_different_numbers():
    mass = torch.tensor([[0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]])
    assert smallest_set(mass, 0.9).sum(-1).tolist() == [1, 4]

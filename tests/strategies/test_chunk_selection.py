from __future__ import annotations

import pytest
import torch

from diffsparse.strategies.chunk_selection import best_by_number, best_by_threshold


def by_threshold(gates: list[float], own: list[bool], threshold: float) -> list[bool]:
    """One chunk after the other, the best first, until what was missing is there."""
    low, high = min(gates), max(gates)
    scaled = [(gate - low) / (high - low if high - low > 1e-6 else 1) for gate in gates]
    have = sum(gate for gate, is_own in zip(scaled, own) if is_own)
    selected, total = list(own), sum(scaled) + 1e-6
    for chunk in sorted((chunk for chunk in range(len(gates)) if not own[chunk]), key=lambda chunk: -scaled[chunk]):
        selected[chunk] = True
        have += scaled[chunk]
        if have / total >= threshold:
            break
    return selected


def cases(values: int):
    """Gates of few values, so that many are equal, and own chunks."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        gates = torch.randint(0, values, (7,), generator=generator).double() / 4
        own = torch.zeros(7, dtype=torch.bool)
        own[torch.randint(0, 7, (int(torch.randint(1, 3, (), generator=generator)),), generator=generator)] = True
        yield gates, own


# No quotient of two sums of quarters up to 7 is near these, so that rounding decides nothing.
@pytest.mark.parametrize("threshold", [0.0, 0.31, 0.59, 0.97])
@pytest.mark.parametrize("values", [1, 2, 5])
def test_the_threshold_is_reached_by_the_best_and_of_equals_the_first(values, threshold):
    for gates, own in cases(values):
        selected = best_by_threshold(gates, own, threshold).tolist()
        assert selected == by_threshold(gates.tolist(), own.tolist(), threshold), (gates, own)


@pytest.mark.parametrize("number", [1, 3, 7, 9])
@pytest.mark.parametrize("values", [1, 2, 5])
def test_the_own_and_the_best_up_to_a_number_and_of_equals_the_first(values, number):
    for gates, own in cases(values):
        ranking = sorted(range(7), key=lambda chunk: (not own[chunk], -gates[chunk]))
        expected = set(ranking[:number]) | set(own.nonzero()[:, 0].tolist())
        assert set(best_by_number(gates, own, number).nonzero()[:, 0].tolist()) == expected


def test_rows_are_selected_each_for_itself():
    gates, own = torch.randn(2, 3, 5, 7), torch.zeros(5, 7, dtype=torch.bool)
    own[:, 2] = True
    for select, setting in ((best_by_threshold, 0.4), (best_by_number, 3)):
        together = select(gates, own, setting)
        assert torch.equal(together[1, 2, 4], select(gates[1, 2, 4], own[4], setting))

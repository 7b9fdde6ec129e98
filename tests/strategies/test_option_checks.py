from __future__ import annotations

import dataclasses

import pytest

from diffsparse import FlexPrefill, SampleAttention
from diffsparse.eval.named_config import exported_strategies
from diffsparse.strategies.option_checks import check_shares

SAMPLING = [("sampled_rows", 0, 1), ("sampled_rows", 2.0, 1), ("seed", -1, 0)]


@pytest.mark.parametrize(
    ("strategy", "name", "value", "least"),
    [(each, *option) for each in exported_strategies().values() for option in SAMPLING if hasattr(each, option[0])],
)
def test_rows_are_sampled_at_least_once_by_a_seed_that_is_none_below_0(strategy, name, value, least):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least {least}, got {value}"):
        strategy(**{name: value})


@pytest.mark.parametrize("strategy", filter(dataclasses.fields, exported_strategies().values()))
def test_numbers_that_no_tensor_or_kernel_could_take_are_refused_when_a_strategy_is_made(strategy):
    refused = {"seed": 2**63} if hasattr(strategy, "seed") else {}
    refused |= {f.name: 65537 for f in dataclasses.fields(strategy) if f.name.endswith("block_size")}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"`{name}` must be an integer of at most {value - 1}, got {value}"):
            strategy(**{name: value})


@pytest.mark.parametrize(
    ("strategy", "name"),
    [(FlexPrefill, "mass"), (FlexPrefill, "threshold"), (SampleAttention, "window"), (SampleAttention, "mass")],
)
@pytest.mark.parametrize("value", [-0.1, 1.5, True, "half", float("nan")])
def test_a_share_is_from_0_to_1(strategy, name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be a number from 0 to 1, got {value!r}\."):
        strategy(**{name: value})


def test_the_ends_are_shares_too_and_the_wrong_one_of_several_is_named():
    check_shares(first=0, second=1.0)
    with pytest.raises(ValueError, match="`second` must be"):
        check_shares(first=0.5, second=2, third=0.5)

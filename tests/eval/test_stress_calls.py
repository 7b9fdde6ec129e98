from __future__ import annotations

import dataclasses

import pytest
import torch

from diffsparse.eval import stress_calls
from diffsparse.eval.stress_calls import calls_of
from diffsparse.eval.stress_trial import DENSE, SIZES, Subject
from diffsparse.kernels import block_sparse_eager
from diffsparse.kernels.self_test import SmallCase

FULL = Subject("eager", "native", "full", "cpu")
SMALL = dataclasses.replace(FULL, size="small")


def calls(subject, **changes):
    return calls_of(dataclasses.asdict(subject) | changes)


@pytest.mark.parametrize(
    "subject",
    [
        dataclasses.replace(FULL, backend=DENSE),
        *(Subject("eager", name, size, "cpu") for name in ("native", "int8", "int8_fp8", "fp8") for size in SIZES),
    ],
    ids=lambda subject: subject.name,
)
def test_what_eager_and_pytorch_compute_is_right_the_same_each_time_and_not_if_a_tile_is_off(subject):
    for call in calls(subject):
        first, second = call.call(), call.call()
        assert call.error(first) <= call.allowed
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        off = [x.clone() for x in first]
        off[0][:, :, :128] += 0.5
        assert not call.error(off) <= call.allowed


def test_the_full_size_is_that_of_a_model_in_both_key_blocks_with_and_without_tail(monkeypatch):
    seen, drawn = [], []
    attend, random_lists = block_sparse_eager.attend, stress_calls.random_lists
    monkeypatch.setattr(stress_calls, "random_lists", lambda *of: drawn.append(of[-1]) or random_lists(*of))

    def look(query, key, value, key_blocks, counts, **options):
        assert (query.shape, counts.shape) == ((1, 2, 384, 64), (1, 2, 3))
        seen.append((options["key_block_size"], options["tail"] is not None))
        return attend(query, key, value, key_blocks, counts, **options)

    monkeypatch.setattr(block_sparse_eager, "attend", look)
    for call in calls(FULL):
        call.call()
    assert seen == [(128, False), (128, True), (64, True)]
    assert drawn == [(128, key_block_size) for key_block_size, _ in seen]


def small_cases(monkeypatch, **changes):
    cases, draw = [], SmallCase.draw
    monkeypatch.setattr(SmallCase, "draw", lambda case, *inputs: cases.append(case) or draw(case, *inputs))
    found = calls(SMALL, **changes)
    return cases, [call.name for call in found]


def test_small_calls_have_every_option(monkeypatch):
    cases, names = small_cases(monkeypatch)
    for field, values in (
        ("head_dim", {64, 128}),
        ("key_block_size", {64, 128}),
        ("has_tail", {False, True}),
        ("has_length", {False, True}),
        ("has_orders", {False, True}),
    ):
        assert {getattr(case, field) for case in cases} == values
    assert len(set(names)) == len(cases) == 8
    assert names[0] == "head dim 64, 64 keys a block, all options"


def test_a_kernel_that_pytorch_stands_in_for_is_not_right():
    from diffsparse.kernels.first_use import is_right

    calls(SMALL)
    with pytest.raises(UserWarning, match="left out"):
        is_right("sums", lambda: False)

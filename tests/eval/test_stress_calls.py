from __future__ import annotations

import dataclasses

import pytest
import torch

from diffsparse.eval.stress_calls import DENSE, Subject, calls_of, small_cases
from diffsparse.kernels import block_sparse_eager

FULL = Subject("eager", "native", "full", False, "cpu", 300, 5, 16, 0.5)
SMALL = dataclasses.replace(FULL, size="small")


def calls(subject, **changes):
    return calls_of(dataclasses.asdict(subject) | changes)


@pytest.mark.parametrize("size", ["full", "small"])
@pytest.mark.parametrize(
    ("backend", "precision"), [(DENSE, "native"), ("eager", "native"), ("eager", "int8"), ("eager", "int8_fp8")]
)
def test_what_eager_and_pytorch_compute_is_right_and_the_same_each_time(backend, precision, size):
    for call in calls(FULL, backend=backend, precision=precision, size=size):
        first, second = call.call(), call.call()
        assert call.error(first) <= call.allowed
        assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("size", ["full", "small"])
@pytest.mark.parametrize("backend", [DENSE, "eager"])
def test_a_tile_that_is_off_is_found(backend, size):
    for call in calls(FULL, backend=backend, size=size):
        results = [x.clone() for x in call.call()]
        results[0][:, :, :128] += 0.5
        assert not call.error(results) <= call.allowed


def test_the_full_size_is_as_asked_with_and_without_tail(monkeypatch):
    seen = []
    attend = block_sparse_eager.attend

    def look(query, key, value, key_blocks, counts, **options):
        seen.append((tuple(query.shape), options["tail"] is not None, float(counts.float().mean()) / 3))
        return attend(query, key, value, key_blocks, counts, **options)

    monkeypatch.setattr(block_sparse_eager, "attend", look)
    for call in calls(FULL):
        call.call()
    assert [(shape, has_tail) for shape, has_tail, _ in seen] == [((1, 5, 300, 16), tail) for tail in (False, True)]
    assert all(0.3 < density < 0.8 for *_, density in seen)


def test_small_calls_have_every_option():
    cases = small_cases("eager", "native", torch.device("cpu"))
    for field, values in (
        ("head_dim", {64, 128}),
        ("key_block_size", {64, 128}),
        ("has_tail", {False, True}),
        ("has_length", {False, True}),
        ("has_orders", {False, True}),
    ):
        assert {getattr(case, field) for case in cases} == values
    names = [call.name for call in calls(SMALL)]
    assert len(set(names)) == len(cases) == 8
    assert names[0] == "head dim 64, 64 keys a block, all options"


def test_a_backend_that_takes_no_small_call_has_none():
    # It needs a GPU.
    assert small_cases("gluon", "native", torch.device("cpu")) == []


def test_what_is_switched_off_is_made_to_run():
    gluon = pytest.importorskip("diffsparse.kernels.block_sparse_gluon")
    assert not gluon.QUANTIZES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gluon, "QUANTIZES", False)
        calls(SMALL, backend=DENSE)
        assert not gluon.QUANTIZES
        calls(SMALL, backend=DENSE, switched_off=True)
        assert gluon.QUANTIZES


def test_a_kernel_that_pytorch_stands_in_for_is_not_right():
    from diffsparse.kernels.first_use import is_right

    calls(SMALL)
    with pytest.raises(UserWarning, match="left out"):
        is_right("sums", lambda: False)

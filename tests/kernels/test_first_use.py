from __future__ import annotations

import sys
import warnings
from types import ModuleType

import pytest
import torch

from diffsparse import block_mask, heads
from diffsparse.kernels import pooling, reorder
from diffsparse.kernels.first_use import is_right, kernels_on
from diffsparse.strategies import select_blocks


def test_a_kernel_that_is_right_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_right("adding", lambda: True)


@pytest.mark.parametrize(("check", "why"), [(lambda: False, "wrong on a small input"), (lambda: 1 / 0, "ZeroDivision")])
def test_a_kernel_that_is_not_right_is_left_out_with_a_warning(check, why):
    with pytest.warns(UserWarning, match=f"adding is left out.*{why}"):
        assert not is_right("adding", check)


def test_a_default_device_does_not_reach_the_check():
    with torch.device("meta"):
        assert is_right("adding", lambda: torch.ones(1).device.type == "cpu")


@pytest.fixture
def kernels(monkeypatch):
    module = ModuleType("diffsparse.kernels.adding_triton")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_on_a_gpu_kernels_are_taken_if_they_pass_their_check(kernels):
    gpu = torch.device("cuda", 1)
    assert kernels_on(gpu, "adding_triton", "adding", lambda module: module is kernels) is kernels
    with pytest.warns(UserWarning, match="adding is left out"):
        assert kernels_on(gpu, "adding_triton", "adding", lambda module: module is not kernels) is None
    with pytest.warns(UserWarning, match="adding is left out.*No module named"):
        assert kernels_on(gpu, "absent_triton", "adding", lambda module: True) is None


@pytest.mark.parametrize(
    "kernels",
    [
        block_mask._kernels,
        heads._kernels,
        heads._error_kernels,
        pooling._kernels,
        pooling._means_kernels,
        reorder._kernels,
        select_blocks._kernels,
    ],
)
@pytest.mark.parametrize(("device", "hip"), [("cpu", None), ("meta", None), ("cuda", "6.4")])
def test_elsewhere_torch_computes_without_a_word(kernels, device, hip, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.__wrapped__(torch.device(device)) is None

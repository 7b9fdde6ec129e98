from __future__ import annotations

import functools
import sys
import warnings
from types import ModuleType

import pytest
import torch

from diffsparse import block_mask, heads
from diffsparse.kernels import block_sparse, launch, pooling, reorder
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


@pytest.mark.parametrize(("capability", "takes"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_gpu_before_ampere_has_no_room_for_kernels(kernels, capability, takes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken = kernels_on(torch.device("cuda", 0), "adding_triton", "adding", lambda module: True)
    assert taken is (kernels if takes else None)


@pytest.fixture
def capture(monkeypatch):
    """A CUDA graph is being captured, until it is called."""
    states = [True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: states[-1])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    return lambda: states.append(False)


def test_nothing_is_learnt_of_kernels_while_a_graph_is_captured(kernels, capture):
    @functools.cache
    def asked(device):
        return kernels_on(device, "adding_triton", "adding", lambda module: True)

    gpu = torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="once before the graph is captured"):
        asked(gpu)
    capture()
    assert asked(gpu) is kernels


def test_no_backend_is_given_up_while_a_graph_is_captured(capture, monkeypatch):
    tried = []
    monkeypatch.setattr(block_sparse, "self_test", lambda *args: tried.append(args) or 0.0)
    asked = functools.cache(block_sparse._why_not_trusted.__wrapped__)
    of_call = "triton", torch.device("cuda", 0), torch.bfloat16, "native"
    with pytest.raises(RuntimeError, match="once before the graph is captured"):
        asked(*of_call)
    assert tried == []
    capture()
    assert asked(*of_call) is None
    assert tried == [of_call]


def test_a_kernel_is_tried_again_where_memory_ran_out(kernels):
    left = [torch.OutOfMemoryError("no memory"), None]

    def check(module):
        if (error := left.pop(0)) is not None:
            raise error
        return True

    asked = functools.cache(lambda device: kernels_on(device, "adding_triton", "adding", check))
    gpu = torch.device("cuda", 0)
    with pytest.raises(torch.OutOfMemoryError):
        asked(gpu)
    assert asked(gpu) is kernels


@pytest.mark.parametrize(
    "out_of_memory", [torch.OutOfMemoryError("no memory"), RuntimeError("MPS backend out of memory")]
)
def test_a_backend_is_tried_again_where_memory_ran_out(out_of_memory, monkeypatch):
    left = [out_of_memory, None]

    def self_test(*args):
        if (error := left.pop(0)) is not None:
            raise error
        return 0.0

    monkeypatch.setattr(block_sparse, "self_test", self_test)
    asked = functools.cache(block_sparse._why_not_trusted.__wrapped__)
    of_call = "triton", torch.device("cuda", 0), torch.bfloat16, "native"
    with pytest.raises(type(out_of_memory)):
        asked(*of_call)
    assert asked(*of_call) is None


def test_before_cuda_is_started_nothing_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: 1 / 0)
    assert not launch.is_captured(torch.device("cuda"))


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

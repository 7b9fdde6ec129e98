from __future__ import annotations

import itertools
import sys
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffsparse.kernels import backends
from diffsparse.kernels.capabilities import Capability, capability, features
from diffsparse.kernels.quantization import PRECISIONS


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes `cuda` a GPU of the given architecture, whose tensors hold nothing."""

    def of(*architecture):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: architecture)

    pytest.importorskip("triton")
    with FakeTensorMode():
        yield of


def test_the_eager_backend_takes_everything_anywhere():
    for precision in PRECISIONS:
        found = capability("eager", "cpu", precision)
        assert set(found.dtypes) == {torch.float32, torch.bfloat16, torch.float16}
        assert found.head_dims == found.query_blocks == found.key_blocks == tuple(range(1, 257))
        assert (found.computed_by, found.reason) == ("eager", None)


@pytest.mark.parametrize("backend", ["gluon", "triton", "flex"])
def test_what_cannot_run_here_takes_nothing_and_says_why(backend):
    pytest.importorskip("triton")
    found = capability(backend, "cpu")
    assert "CPU" in found.reason or "CUDA" in found.reason
    assert found == Capability(reason=found.reason)


def test_on_hopper_the_gluon_backend_takes_halves_and_leaves_some_precisions_to_triton(gpu):
    gpu(9, 0)
    found = capability("gluon", "cuda")
    assert found.dtypes == (torch.bfloat16, torch.float16)
    assert (found.head_dims, found.query_blocks, found.key_blocks) == ((64, 128), (128,), (64, 128))
    left = {precision for precision in PRECISIONS if capability("gluon", "cuda", precision).computed_by == "triton"}
    assert left == {"int8_int8", "int4"}
    assert found.computed_by == "gluon"


def test_fp8_needs_ada_and_key_blocks_of_32(gpu):
    gpu(8, 6)
    assert "8.9" in capability("triton", "cuda", "fp8").reason
    assert capability("triton", "cuda", "int8").key_blocks == (16, 32, 64, 128)
    gpu(8, 9)
    assert capability("triton", "cuda", "fp8").key_blocks == (32, 64, 128)
    assert "9.0" in capability("gluon", "cuda").reason


@pytest.mark.parametrize("architecture", [(8, 0), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_asking_about_one_thing_at_a_time_is_asking_about_all(gpu, architecture, backend):
    gpu(*architecture)
    for precision in PRECISIONS:
        found = capability(backend, "cuda", precision)
        for dtype, head_dim in itertools.product((torch.float32, torch.bfloat16, torch.float16), (40, 64, 128)):
            query = torch.empty((1, 1, 1, head_dim), dtype=dtype, device="cuda")
            for blocks in itertools.product((16, 32, 64, 128, 256), repeat=2):
                takes = backends.why_not(backend, query, *blocks, precision) is None
                assert takes == (
                    dtype in found.dtypes
                    and head_dim in found.head_dims
                    and blocks[0] in found.query_blocks
                    and blocks[1] in found.key_blocks
                )


def test_a_dtype_that_is_not_the_usual_one_is_found(monkeypatch):
    odd = ModuleType("odd_backend")
    odd.why_not = lambda query, *sizes: None if query.dtype == torch.float32 else "it takes float32 alone"
    odd.attend = lambda query, key, value, key_blocks, counts, *, key_length, return_lse: None
    monkeypatch.setitem(sys.modules, "odd_backend", odd)
    monkeypatch.setitem(backends.BACKENDS, "odd", "odd_backend")
    assert capability("odd", "cpu").dtypes == (torch.float32,)
    assert capability("odd", "cpu", "int8").reason == "it does not compute in int8"
    assert features("odd") == ("key lengths", "logsumexp")
    assert features("eager") == ("pooled tail", "key lengths", "logsumexp")

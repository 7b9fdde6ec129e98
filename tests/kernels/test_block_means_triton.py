from __future__ import annotations

from pathlib import Path

import pytest
import torch
from triton_without_gpu import Launches, Operators, compile_for, passes_in_the_interpreter

from diffsparse.kernels import pooling
from diffsparse.kernels.cross_compile_triton import SHARED_MEMORY, resources
from diffsparse.kernels.pooling import LARGEST_BLOCK, block_means

pytest.importorskip("triton")


def test_the_kernel_gives_what_torch_gives_in_the_interpreter():
    passes_in_the_interpreter(Path(__file__).with_name("interpreted_block_means_triton.py"))


NEITHER = {"order_ptr": None, "key_length_ptr": None}
STRIDES = ("x_stride_b", "x_stride_h", "x_stride_s")
LAUNCHES = [
    *((capability, "bf16", 128, {}, STRIDES) for capability in SHARED_MEMORY),
    *((capability, "bf16", 64, NEITHER, (*STRIDES, "block_size")) for capability in SHARED_MEMORY),
    *((90, dtype, dim, {}, ()) for dtype in ("fp16", "fp32") for dim in (20, 256)),
    (90, "bf16", 128, {"block_size": 1}, STRIDES),
]


@pytest.mark.parametrize(("capability", "dtype", "dim", "constants", "even"), LAUNCHES)
def test_it_compiles_for_every_architecture(capability, dtype, dim, constants, even):
    from diffsparse.kernels import block_means_triton

    pointers = {
        "x_ptr": f"*{dtype}",
        "order_ptr": "*i64",
        "key_length_ptr": "*i32",
        "means_ptr": "*fp32",
        "token_counts_ptr": "*i64",
    }
    padded_dim = 1 << (dim - 1).bit_length()
    rows = block_means_triton.NUMBERS // padded_dim
    constants = {"HEAD_DIM": dim, "PADDED_DIM": padded_dim, "ROWS": rows, **constants}
    compiled = compile_for(capability, block_means_triton.block_means_kernel, pointers, constants, even)
    assert compiled.metadata.shared <= 48 * 1024
    assert resources(compiled).spilled_bytes == 0


def test_another_resolution_compiles_nothing():
    from diffsparse.kernels import block_means_triton

    numbers = {x.name: x for x in block_means_triton.block_means_kernel.params}
    assert all(numbers[name].do_not_specialize for name in ("num_tokens", "order_stride_h"))
    assert not any(numbers[name].is_constexpr for name in ("num_tokens", "block_size"))


@pytest.fixture
def launches(monkeypatch):
    from diffsparse.kernels import block_means_triton

    launches = Launches()
    monkeypatch.setattr(block_means_triton, "block_means_kernel", launches)
    monkeypatch.setattr(pooling, "_means_kernels", lambda device: block_means_triton)
    return launches


@pytest.mark.parametrize("has_lengths", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_means_and_counts_are_one_launch(has_lengths, ordered, launches):
    x = torch.randn(2, 70, 3, 8).transpose(1, 2)
    key_length = torch.tensor([70, 20], dtype=torch.int32) if has_lengths else None
    order = torch.arange(70)[None] if ordered else None
    with Operators() as operators:
        means, token_counts = block_means(x, 16, key_length, order)
    assert {*operators.seen} <= {"aten.empty", "aten.detach"}
    assert launches.grids == [(5, 3, 2)]
    assert (means.shape, token_counts.shape) == ((2, 3, 5, 8), (2 if has_lengths else 1, 5))


def test_torch_takes_the_means_of_few_large_blocks_and_of_what_lies_across(launches):
    block_means(torch.randn(1, 1, LARGEST_BLOCK + 1, 2), LARGEST_BLOCK + 1)
    block_means(torch.randn(1, 1, 8, 70).mT, 16)
    assert launches.grids == []

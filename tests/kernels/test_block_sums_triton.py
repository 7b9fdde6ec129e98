from __future__ import annotations

from pathlib import Path

import pytest
import torch
from triton_without_gpu import Launches, compile_for, passes_in_the_interpreter

from diffsparse import heads
from diffsparse.heads import BlockSums
from diffsparse.kernels.cross_compile_triton import SHARED_MEMORY

triton = pytest.importorskip("triton")


def test_the_kernel_gives_what_torch_gives_in_the_interpreter():
    passes_in_the_interpreter(Path(__file__).with_name("interpreted_block_sums_triton.py"))


def compiled(capability, rows, dim, block_size, dtype):
    from diffsparse.kernels import block_sums_triton

    kernel = block_sums_triton.block_sums_kernel
    pointers = dict.fromkeys(("query_ptr", "key_ptr", "value_ptr"), f"*{dtype}")
    pointers |= dict.fromkeys(("numerators_ptr", "sums_ptr", "means_ptr"), "*fp32")
    pointers |= {"order_ptr": "*i64", "key_length_ptr": "*i32"}
    constants = {"HEAD_DIM": dim, "PADDED_DIM": dim, "PADDED_ROWS": rows, "BLOCK": block_size}
    constants |= {"PADDED_BLOCK": block_size}
    strides = [f"{name}_stride_{axis}" for name in ("key", "value") for axis in "bhs"]
    return compile_for(capability, kernel, pointers, constants, strides)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(
    ("rows", "dim", "block_size", "dtype"), [(64, 128, 64, "bf16"), (64, 256, 64, "bf16"), (16, 64, 64, "fp32")]
)
def test_what_is_said_to_fit_does_so_everywhere(capability, rows, dim, block_size, dtype):
    from diffsparse.kernels import block_sums_triton

    size = 4 if dtype == "fp32" else 2
    assert block_sums_triton.fits(rows, dim, block_size, size)
    # With query, key and value, whatever of them a compiler holds in shared memory at a time.
    tiles = (rows + 2 * block_size) * dim * size
    shared = compiled(capability, rows, dim, block_size, dtype).metadata.shared
    assert shared <= tiles + 1024 <= block_sums_triton.LARGEST_TILES + 1024 <= SHARED_MEMORY[capability]


@pytest.mark.parametrize(
    ("rows", "dim", "block_size", "dtype"),
    [(64, 128, 128, torch.float32), (64, 256, 128, torch.bfloat16), (256, 128, 128, torch.bfloat16)],
)
def test_torch_takes_blocks_that_do_not_fit(rows, dim, block_size, dtype, monkeypatch):
    from diffsparse.kernels import block_sums_triton

    launches = Launches()
    monkeypatch.setattr(block_sums_triton, "block_sums_kernel", launches)
    monkeypatch.setattr(heads, "_kernels", lambda device: block_sums_triton)
    query, key, value = torch.randn(1, 1, rows, dim), *torch.randn(2, 1, 1, 150, dim).to(dtype)
    sums = BlockSums.of(query, key, value, block_size)
    assert not any(x.isnan().any() for x in vars(sums).values())
    assert launches.grids == []
    BlockSums.of(query[:, :, :16], key, value, 16)
    assert launches.grids == [(10, 1)]

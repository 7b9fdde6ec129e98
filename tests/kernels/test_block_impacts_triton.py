from __future__ import annotations

from pathlib import Path

import pytest
import torch
from triton_without_gpu import Launches, Operators, compile_for, passes_in_the_interpreter

from diffsparse.kernels.cross_compile_triton import SHARED_MEMORY, machine_code, resources
from diffsparse.strategies import block_impacts as judging
from diffsparse.strategies.block_impacts import block_impacts

triton = pytest.importorskip("triton")


def test_the_kernel_gives_what_torch_gives_in_the_interpreter():
    passes_in_the_interpreter(Path(__file__).with_name("interpreted_block_impacts_triton.py"))


POINTERS = {
    "query_ptr": "*fp32",
    "output_ptr": "*fp32",
    "order_ptr": "*i64",
    "key_length_ptr": "*i32",
    "impacts_ptr": "*fp32",
    "logit_scale": "fp32",
}
STRIDES = [f"{name}_stride_{axis}" for name in ("key", "value") for axis in "bhs"]
OPTIONS = ("num_warps", "num_stages")


def compiled(capability, rows, dim, block_size=64, dtype="bf16", tail=True, is_plain=False):
    from diffsparse.kernels import block_impacts_triton

    chosen = block_impacts_triton.compiled_for(
        rows,
        dim,
        block_size,
        4 if dtype == "fp32" else 2,
        is_ordered=not is_plain,
        takes_large_tiles=capability in (90, 100),
    )
    options = {name: chosen.pop(name) for name in OPTIONS}
    constants = {**chosen, "TAIL": tail, **(dict.fromkeys(("order_ptr", "key_length_ptr")) if is_plain else {})}
    pointers = POINTERS | {"key_ptr": f"*{dtype}", "value_ptr": f"*{dtype}"}
    kernel = block_impacts_triton.block_impacts_kernel
    return compile_for(capability, kernel, pointers, constants, STRIDES if dim % 16 == 0 else (), options)


# Few queries, such as sampled rows, and as many as there are query blocks; at each size of a tile.
@pytest.mark.parametrize(
    ("dim", "block_size", "dtype"),
    [
        (64, 64, "bf16"),
        (128, 64, "bf16"),
        (128, 128, "bf16"),
        (256, 64, "bf16"),
        (256, 128, "bf16"),
        (128, 64, "fp32"),
    ],
)
@pytest.mark.parametrize("rows", [64, 591])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_it_compiles_for_every_architecture(capability, rows, dim, block_size, dtype):
    taken = resources(compiled(capability, rows, dim, block_size, dtype))
    assert taken.spilled_bytes == 0
    assert taken.shared_bytes <= SHARED_MEMORY[capability]


@pytest.mark.parametrize(("tail", "is_plain"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("rows", [64, 591])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_it_compiles_for_every_architecture_without_what_may_be_left_out(capability, rows, tail, is_plain):
    taken = resources(compiled(capability, rows, 128, tail=tail, is_plain=is_plain))
    assert taken.spilled_bytes == 0
    assert taken.shared_bytes <= SHARED_MEMORY[capability]


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("rows", [64, 591])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_products_are_of_tensor_cores_and_keys_and_values_are_copied_meanwhile(capability, rows, is_plain):
    code = machine_code(compiled(capability, rows, 128, is_plain=is_plain))
    instruction = {90: "HGMMA.64x", 100: "UTCHMMA"}.get(capability, "HMMA.16816.F32.BF16")
    assert instruction in code
    # Straight to shared memory, 16 bytes a thread: two blocks before the loop, and in it one that is not waited for.
    copies = [line for line in code.splitlines() if "LDGSTS" in line and ".128" in line]
    threads = 256 if rows > 64 and capability in (90, 100) else 128
    assert len(copies) >= 3 * 2 * 64 * 128 * 2 // 16 // threads

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


# Few queries, such as sampled rows, and as many as there are query blocks; a size of each tile.
CASES = [
    (64, 128, 64, "bf16"),
    (591, 128, 64, "bf16"),
    (591, 64, 64, "fp16"),
    (591, 128, 128, "bf16"),
    (591, 256, 64, "bf16"),
    (591, 64, 256, "bf16"),
    (591, 128, 64, "fp32"),
]


@pytest.mark.parametrize(("rows", "dim", "block_size", "dtype"), CASES)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_it_compiles_for_every_architecture(capability, rows, dim, block_size, dtype):
    from diffsparse.kernels import block_impacts_triton

    assert block_impacts_triton.fits(dim, block_size, 4 if dtype == "fp32" else 2)
    taken = resources(compiled(capability, rows, dim, block_size, dtype))
    assert taken.spilled_bytes == 0
    assert taken.shared_bytes <= SHARED_MEMORY[capability]


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_it_compiles_for_every_architecture_without_an_order(capability, tail):
    taken = resources(compiled(capability, 591, 128, tail=tail, is_plain=True))
    assert taken.spilled_bytes == 0
    assert taken.shared_bytes <= SHARED_MEMORY[capability]


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_products_are_of_tensor_cores_while_keys_and_values_are_copied(capability, is_plain):
    code = machine_code(compiled(capability, 591, 128, is_plain=is_plain))
    assert {90: "HGMMA.64x", 100: "UTCHMMA"}.get(capability, "HMMA.16816.F32.BF16") in code
    # Straight to shared memory, 16 bytes a thread: two blocks before the loop, and in it one that is not waited for.
    copies = [line for line in code.splitlines() if "LDGSTS" in line and ".128" in line]
    threads = 256 if capability in (90, 100) else 128
    assert len(copies) >= 3 * 2 * 64 * 128 * 2 // 16 // threads


def test_another_resolution_compiles_nothing():
    from diffsparse.kernels import block_impacts_triton

    parameters = block_impacts_triton.block_impacts_kernel.params
    numbers = {x.name for x in parameters if not x.is_constexpr and x.name not in {*POINTERS, "key_ptr", "value_ptr"}}
    # Steps of keys and values are multiples of 16 at any resolution, which makes loads of 16 bytes of them.
    assert {x.name for x in parameters if x.name in numbers and not x.do_not_specialize} == set(STRIDES)
    assert numbers - set(STRIDES) == {"order_stride_h", "heads", "num_rows", "num_tokens"}
    # From image to video, the number of queries is one of two to the compiler.
    chosen = [
        block_impacts_triton.compiled_for(rows, 128, 64, 2, is_ordered=True, takes_large_tiles=True)
        for rows in (1, 64, 65, 591)
    ]
    assert chosen[0] == chosen[1] != chosen[2] == chosen[3]


@pytest.fixture
def launches(monkeypatch):
    from diffsparse.kernels import block_impacts_triton

    launches = Launches()
    monkeypatch.setattr(block_impacts_triton, "block_impacts_kernel", launches)
    monkeypatch.setattr(judging, "_kernels", lambda device: block_impacts_triton)
    return launches


@pytest.mark.parametrize("has_lengths", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_all_impacts_are_one_launch(has_lengths, ordered, launches):
    query = torch.randn(2, 3, 70, 8)
    key, value = (torch.randn(2, 300, 3, 8).bfloat16().transpose(1, 2) for _ in range(2))
    key_length = torch.tensor([300, 20], dtype=torch.int32) if has_lengths else None
    order = torch.arange(300)[None] if ordered else None
    with Operators() as operators:
        impacts = block_impacts(query, query, key, value, 16, scale=0.5, tail=True, order=order, key_length=key_length)
    assert operators.seen == ["aten.empty"]
    # Two tiles of queries, two times up to 16 of the 19 key blocks; six heads.
    assert launches.grids == [(4, 6)]
    assert impacts.shape == (2, 3, 70, 19)


def test_torch_takes_blocks_that_do_not_fit(launches):
    x = torch.randn(1, 1, 150, 256)
    impacts = block_impacts(x, x, x, x, 64, scale=0.5, tail=True)
    assert not impacts.isnan().any()
    assert launches.grids == []

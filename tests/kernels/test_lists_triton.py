from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from triton_without_gpu import Launches, Operators, compile_for, passes_in_the_interpreter

from diffsparse import block_mask
from diffsparse.block_mask import BlockMask
from diffsparse.kernels import pooling
from diffsparse.kernels.cross_compile_triton import SHARED_MEMORY, resources

triton = pytest.importorskip("triton")


def test_the_kernels_give_what_torch_gives_in_the_interpreter():
    passes_in_the_interpreter(Path(__file__).with_name("interpreted_lists_triton.py"))


POINTERS = {
    "bits_ptr": "*u8",
    "lists_ptr": "*i32",
    "key_blocks_ptr": "*i32",
    "counts_ptr": "*i32",
    "key_length_ptr": "*i32",
    "logs_ptr": "*fp32",
}


ONES = dict.fromkeys(("lists_stride_c", "key_block_size"), 1)
LAUNCHES = [
    *((capability, name, {}, ()) for capability in SHARED_MEMORY for name in ("lists_kernel", "tail_logs_kernel")),
    *((capability, "tail_logs_kernel", {"key_length_ptr": None}, ("num_padded",)) for capability in SHARED_MEMORY),
    (90, "tail_logs_kernel", ONES, ()),
    (90, "tail_logs_kernel", {"key_length_ptr": None, **ONES}, ()),
]


@pytest.mark.parametrize(("capability", "name", "constants", "even"), LAUNCHES)
def test_they_compile_for_every_architecture(capability, name, constants, even):
    from diffsparse.kernels import lists_triton

    constants = {"CHUNK": lists_triton.CHUNK, **constants}
    compiled = compile_for(capability, getattr(lists_triton, name), POINTERS, constants, even)
    assert compiled.metadata.shared <= 48 * 1024
    assert resources(compiled).spilled_bytes == 0
    if name == "tail_logs_kernel":
        # No -inf of a listed block is overtaken by the block's logarithm.
        barriers_and_stores = "".join(x[0] for x in re.findall(r"bar\.sync|st\.global", compiled.asm["ptx"]))
        assert re.fullmatch("b*s+b+s+", barriers_and_stores)


def test_another_resolution_compiles_nothing():
    from diffsparse.kernels import lists_triton

    kernels = lists_triton.lists_kernel, lists_triton.tail_logs_kernel
    numbers = {x.name: x for kernel in kernels for x in kernel.params if x.name not in POINTERS}
    assert numbers.pop("CHUNK").is_constexpr
    # Of a config and a backend the first two are the same at any resolution. Multiples of 16 are stored 16 at a time.
    same = {"key_block_size", "lists_stride_c", "num_padded"}
    assert {name for name, x in numbers.items() if not x.do_not_specialize} == same


def test_lists_are_one_launch(monkeypatch):
    from diffsparse.kernels import lists_triton

    launches = Launches()
    monkeypatch.setattr(lists_triton, "lists_kernel", launches)
    monkeypatch.setattr(block_mask, "_kernels", lambda device: lists_triton)
    mask = BlockMask.from_visible(torch.rand(2, 3, 5, 9) < 0.4, 65, 16, 8)
    with Operators() as operators:
        mask.lists()
    assert operators.seen == ["aten.empty"]
    assert launches.grids == [(2 * 3 * 5,)]


@pytest.mark.parametrize("length", [None, 50])
def test_logarithms_are_one_launch(length, monkeypatch):
    from diffsparse.kernels import lists_triton

    launches = Launches()
    monkeypatch.setattr(lists_triton, "tail_logs_kernel", launches)
    monkeypatch.setattr(pooling, "_kernels", lambda device: lists_triton)
    key_blocks, counts = torch.zeros(1, 1, 5, 9, dtype=torch.int32), torch.ones(1, 1, 5, dtype=torch.int32)
    key_length = None if length is None else torch.tensor([length, length], dtype=torch.int32)
    with Operators() as operators:
        logs = pooling.tail_logs(key_blocks.expand(2, 3, -1, -1), counts.expand(2, 3, -1), 65, 8, key_length, 16)
    assert operators.seen == ["aten.empty"]
    assert launches.grids == [(5, 2 * 3)]
    assert logs.shape == (2, 3, 5, 16)

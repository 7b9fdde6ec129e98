from __future__ import annotations

from pathlib import Path

import pytest
import torch
from triton_without_gpu import Launches, Operators, compile_for, passes_in_the_interpreter

from diffsparse.kernels.cross_compile_triton import SHARED_MEMORY, resources
from diffsparse.strategies import select_blocks as choosing
from diffsparse.strategies.select_blocks import select_blocks

pytest.importorskip("triton")


def test_the_kernel_chooses_what_torch_chooses_in_the_interpreter():
    passes_in_the_interpreter(Path(__file__).with_name("interpreted_selection_triton.py"))


POINTERS = {
    "scores_ptr": "*fp32",
    "counts_ptr": "*i64",
    "always_ptr": "*i1",
    "bits_ptr": "*u8",
    "num_seen_ptr": "*i32",
}


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_it_compiles_for_every_architecture(capability):
    from diffsparse.kernels import selection_triton

    constants = {"CHUNK": selection_triton.CHUNK}
    compiled = compile_for(capability, selection_triton.select_kernel, POINTERS, constants)
    assert compiled.metadata.shared <= 48 * 1024
    assert resources(compiled).spilled_bytes == 0


def test_another_resolution_compiles_nothing():
    from diffsparse.kernels import selection_triton

    numbers = {x.name: x for x in selection_triton.select_kernel.params if x.name not in POINTERS}
    assert numbers.pop("CHUNK").is_constexpr
    assert len(numbers) == 3
    assert all(x.do_not_specialize for x in numbers.values())


@pytest.mark.parametrize("heads", [1, 3])
def test_a_mask_is_one_launch(heads, monkeypatch):
    from diffsparse.kernels import selection_triton

    launches = Launches()
    monkeypatch.setattr(selection_triton, "select_kernel", launches)
    monkeypatch.setattr(choosing, "_kernels", lambda device: selection_triton)
    inputs = torch.randn(2, heads, 5, 9), torch.tensor([1, 3, 4]), torch.rand(5, 9) < 0.2
    with Operators() as operators:
        mask = select_blocks(*inputs, 65, 16, 8)
    assert operators.seen == ["aten.empty", "aten.empty"]
    assert launches.grids == [(5, 3, 2)]
    assert (mask.bits.shape, mask.counts.shape) == ((2, 3, 5, 2), (2, 3, 5))

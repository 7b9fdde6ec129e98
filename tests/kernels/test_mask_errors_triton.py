from __future__ import annotations

from pathlib import Path

import pytest
from triton_without_gpu import passes_in_the_interpreter

from diffsparse.kernels.cross_compile_triton import SHARED_MEMORY, machine_code, resources

triton = pytest.importorskip("triton")


def test_the_kernel_gives_what_torch_gives_in_the_interpreter():
    passes_in_the_interpreter(Path(__file__).with_name("interpreted_mask_errors_triton.py"))


def compile_for(capability, dim, num_masks):
    """Compile without a GPU. As at a launch: tensors are aligned, slices of the block sums need not be."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from diffsparse.kernels import mask_errors_triton
    from diffsparse.kernels.launch import FUSION

    kernel = mask_errors_triton.mask_errors_kernel
    constants = mask_errors_triton.constants(dim, num_masks)
    types = {"rank_ptr": "*i32", "always_ptr": "*u8", "limits_ptr": "*i64"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    aligned = [
        i
        for i, parameter in enumerate(kernel.params)
        if parameter.name.endswith("_ptr") and not parameter.do_not_specialize_on_alignment
    ]
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=mask_errors_triton.OPTIONS | FUSION)


# Of the default candidates an order has two rules at five numbers of blocks and all; there are four rules.
CASES = [*((capability, 128, 12) for capability in SHARED_MEMORY), (90, 32, 12), (90, 80, 12), (89, 128, 24)]


@pytest.mark.parametrize(("capability", "dim", "num_masks"), CASES)
def test_it_compiles_for_every_architecture(capability, dim, num_masks):
    from diffsparse.kernels import mask_errors_triton

    compiled = compile_for(capability, dim, num_masks)
    taken = resources(compiled)
    assert taken.shared_bytes <= 48 * 1024
    assert taken.spilled_bytes == 0
    # Each of the two products is three of tensor cores, on 16 masks, 8 key blocks and 8 numbers a time; by four warps.
    tile = mask_errors_triton.constants(dim, num_masks)
    times = tile["PADDED_MASKS"] // 16 * (tile["KEY_TILE"] // 8) * (tile["DIM_TILE"] // 8) // 4
    instructions = [line for line in machine_code(compiled).splitlines() if "HMMA.1688.F32.TF32" in line]
    assert taken.products == ("HMMA",)
    assert len(instructions) == 2 * 3 * times


def test_another_resolution_or_density_compiles_nothing():
    from diffsparse.kernels import mask_errors_triton

    parameters = mask_errors_triton.mask_errors_kernel.params
    numbers = [x for x in parameters if not x.is_constexpr and not x.name.endswith("_ptr")]
    assert len(numbers) == 8
    assert all(x.do_not_specialize for x in numbers)
    assert mask_errors_triton.constants(128, 2) == mask_errors_triton.constants(128, 12)
    # These lie in one tensor, one behind the other.
    slices = {x.name for x in parameters if x.do_not_specialize_on_alignment}
    assert slices == {"denominators_ptr", "peaks_ptr", "tail_ptr"}

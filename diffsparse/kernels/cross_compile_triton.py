"""The Triton attention kernel compiled for architectures that are not here, and what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsparse.kernels import amd
from diffsparse.kernels.launch import FUSION
from diffsparse.kernels.quantization import PRECISIONS

# Bytes of shared memory that a program may use: NVIDIA, CUDA C++ Programming Guide, technical specifications.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
OF_AMD = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
"""CDNA 2, 3 and 4, RDNA 3 and 4."""


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, bytes spilled from them, bytes of shared memory a program.

    `products` are the kinds of matrix instructions in its machine code, on AMD's GPUs with their size and types.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    products: tuple[str, ...]


def compile_attention(
    architecture: int | str,
    head_dim: int,
    dtype: str,
    blocks: tuple[int, int],
    options: Collection[str] = (),
    precision: str = "native",
) -> Any:
    """Compile the kernel as a GPU of this architecture would, as far as it can be known.

    Args:
        architecture: compute capability, one of `SHARED_MEMORY` (90 for 9.0), or AMD's name, such as of `OF_AMD`.
        head_dim: numbers a head.
        dtype: "bf16", "fp16" or "fp32".
        blocks: tokens of a query and of a key block.
        options: which of "lse", "length" (key lengths), "tail" and "order" (of queries) it has.
        precision: one of `PRECISIONS`.
    """
    import triton
    from triton.compiler import ASTSource

    from diffsparse.kernels import block_sparse_triton
    from diffsparse.kernels.tuning import tuning

    kernel = block_sparse_triton.attention_kernel
    formats = PRECISIONS[precision]
    scores = {"native": dtype, "int8": "i8", "int4": "u8", "fp8": "fp8e4nv"}[formats.scores]
    quantizes_values = formats.values != "native"
    values = {"native": dtype, "int8": "i8", "fp8": "fp8e4nv"}[formats.values]
    padded_dim = block_sparse_triton.padded(head_dim, precision)
    element_size = 4 if dtype == "fp32" else 2
    if isinstance(architecture, str):
        chosen = amd.tuning(architecture, *blocks, padded_dim, precision)
    else:
        memory = SHARED_MEMORY[architecture]
        chosen = tuning(divmod(architecture, 10), memory, *blocks, padded_dim, precision, element_size)
    inputs = {
        "query_ptr": f"*{scores}",
        "keys": f"*{scores}",
        "values": f"*{values}",
        "out_ptr": f"*{dtype}",
        "key_blocks_ptr": "*i32",
        "counts_ptr": "*i32",
        "schedule_ptr": "*i32",
    }
    if chosen.descriptors:
        width = padded_dim // (2 if formats.scores == "int4" else 1)
        inputs["keys"] = f"tensordesc<{scores}[1, 1, {chosen.key_tile}, {width}]>"
        tile = (padded_dim, chosen.key_tile) if quantizes_values else (chosen.key_tile, padded_dim)
        inputs["values"] = f"tensordesc<{values}[1, 1, {tile[0]}, {tile[1]}]>"
    if "lse" in options:
        inputs["lse_ptr"] = "*fp32"
    if "length" in options:
        inputs["key_length_ptr"] = "*i32"
    if "order" in options:
        inputs["query_order_ptr"] = "*i64"
    if "tail" in options:
        inputs |= {"has_tail_ptr": "*i32", "tail_logs_ptr": "*fp32"}
        inputs |= dict.fromkeys(("pooled_key_ptr", "pooled_value_ptr"), f"*{dtype}")
    if precision != "native":
        inputs |= dict.fromkeys(("query_scale_ptr", "key_scale_ptr"), "*fp32")
    if quantizes_values:
        inputs["value_scale_ptr"] = "*fp32"
    constants = {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim,
        "QUERY_BLOCK": blocks[0],
        "KEY_BLOCK": blocks[1],
        "KEY_TILE": chosen.key_tile,
        "TAIL_TILE": min(chosen.key_tile, block_sparse_triton.TAIL_COLUMNS),
        "DESCRIPTORS": chosen.descriptors,
        "VALUES": formats.values,
    }
    constants |= dict.fromkeys(name for name in kernel.arg_names if name.endswith("_ptr") and name not in inputs)
    signature = {
        name: "constexpr" if name in constants else inputs.get(name, "fp32" if name == "logit_scale" else "i32")
        for name in kernel.arg_names
    }
    # As at a launch: pointers are aligned, and the strides of query, key, value and output are multiples of 16.
    strides = re.compile("(query|key|value|out)_stride")
    places = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or strides.match(name)]
    return triton.compile(
        ASTSource(
            fn=kernel,
            signature=signature,
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in places},
        ),
        target=target(architecture),
        options={"num_warps": chosen.num_warps, "num_stages": chosen.num_stages} | FUSION,
    )


def target(architecture: int | str) -> Any:
    """What Triton calls a GPU of this compute capability, or of this architecture of AMD."""
    from triton.backends.compiler import GPUTarget

    if isinstance(architecture, str):
        return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)
    return GPUTarget("cuda", architecture, 32)


def resources(compiled: Any) -> Resources:
    """Read off the machine code, by the tool that comes with Triton."""
    if "amdgcn" in compiled.asm:
        return _resources_of_amd(compiled)
    usage = _dump(compiled, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None, usage
    products = sorted(set(re.findall(r"\b([A-Z]*(?:MMA|GMMA))\.", machine_code(compiled))))
    return Resources(int(found[1]), int(found[2]) + int(found[3]), compiled.metadata.shared, tuple(products))


def _resources_of_amd(compiled: Any) -> Resources:
    """As the assembler notes it below the code; accumulation registers of CDNA count among the others."""
    code: str = compiled.asm["amdgcn"]
    registers, scratch = (
        int(re.findall(rf"\.{name}:\s+(\d+)", code)[-1]) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    products = sorted(set(re.findall(r"\bv_((?:mfma|wmma)_\w+)", code)))
    return Resources(registers, scratch, compiled.metadata.shared, tuple(products))


def machine_code(compiled: Any) -> str:
    """The instructions of a compiled kernel, a line each."""
    return _dump(compiled, "-sass")


def _dump(compiled: Any, what: str) -> str:
    import triton

    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, what, binary]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffsparse.kernels import block_sparse

triton = pytest.importorskip("triton")

# Bytes of shared memory that a program may use: NVIDIA, CUDA C++ Programming Guide, technical specifications.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


def test_it_keeps_to_the_specification_in_the_interpreter():
    file = Path(__file__).with_name("interpreted_block_sparse_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


def test_what_it_cannot_take_has_a_reason():
    from diffsparse.kernels import block_sparse_triton

    assert "CUDA" in block_sparse_triton.why_not(torch.zeros(1, 1, 64, 64), 64, 64)


@pytest.mark.parametrize("error", [0.1, math.nan, RuntimeError("ptxas is missing")])
def test_a_backend_that_fails_its_self_test_is_not_used(monkeypatch, error):
    def self_test(*args):
        if isinstance(error, Exception):
            raise error
        return error

    monkeypatch.setattr(block_sparse, "self_test", self_test)
    monkeypatch.setattr(block_sparse, "_why_not", lambda *args: None)
    block_sparse._why_not_trusted.cache_clear()
    query = torch.empty((1, 1, 64, 64), device="meta")
    with pytest.raises(ValueError, match="triton: its self-test"):
        block_sparse.pick_backend("triton", query, 64, 64)
    block_sparse._why_not_trusted.cache_clear()


def compile_for(capability, head_dim, dtype, blocks, tuning, options=(), precision="native"):
    """Compile the kernel without a GPU, with the optional inputs named in `options`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from diffsparse.kernels import block_sparse_triton
    from diffsparse.kernels.quantization import PRECISIONS

    kernel = block_sparse_triton.attention_kernel
    formats = PRECISIONS[precision]
    scores = {"native": dtype, "int8": "i8", "int4": "i8", "fp8": "fp8e4nv"}[formats.scores]
    fp8_values = formats.values == "fp8"
    values = "fp8e4nv" if fp8_values else dtype
    padded_dim = triton.next_power_of_2(max(head_dim, 16))
    inputs = {
        "query_ptr": f"*{scores}",
        "keys": f"*{scores}",
        "values": f"*{values}",
        "out_ptr": f"*{dtype}",
        "key_blocks_ptr": "*i32",
        "counts_ptr": "*i32",
    }
    if tuning.descriptors:
        inputs["keys"] = f"tensordesc<{scores}[1, 1, {tuning.key_tile}, {padded_dim}]>"
        tile = (padded_dim, tuning.key_tile) if fp8_values else (tuning.key_tile, padded_dim)
        inputs["values"] = f"tensordesc<{values}[1, 1, {tile[0]}, {tile[1]}]>"
    if "lse" in options:
        inputs["lse_ptr"] = "*fp32"
    if "length" in options:
        inputs["key_length_ptr"] = "*i32"
    if "tail" in options:
        inputs |= {"has_tail_ptr": "*i32", "listed_ptr": "*u8"}
        inputs |= dict.fromkeys(("pooled_key_ptr", "pooled_value_ptr"), f"*{dtype}")
    if precision != "native":
        inputs |= dict.fromkeys(("query_scale_ptr", "key_scale_ptr"), "*fp32")
    if fp8_values:
        inputs["value_scale_ptr"] = "*fp32"
    constants = {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim,
        "QUERY_BLOCK": blocks[0],
        "KEY_BLOCK": blocks[1],
        "KEY_TILE": tuning.key_tile,
        "TAIL_TILE": min(tuning.key_tile, block_sparse_triton.TAIL_COLUMNS),
        "DESCRIPTORS": tuning.descriptors,
        "FP8_VALUES": fp8_values,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }
    constants |= dict.fromkeys(name for name in kernel.arg_names if name.endswith("_ptr") and name not in inputs)
    signature = {
        name: "constexpr" if name in constants else inputs.get(name, "fp32" if name == "logit_scale" else "i32")
        for name in kernel.arg_names
    }
    # As at a launch: pointers are aligned, and the strides of query, key and value are multiples of 16.
    strides = re.compile("(query|key|value)_stride")
    places = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or strides.match(name)]
    return triton.compile(
        ASTSource(
            fn=kernel,
            signature=signature,
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in places},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tuning.num_warps, "num_stages": tuning.num_stages},
    )


ALL = ("lse", "length", "tail")
CONFIGURATIONS = [
    (64, "bf16", (64, 64), ALL, "native"),
    (64, "fp16", (128, 128), (), "native"),
    (128, "bf16", (64, 64), ALL, "native"),
    (128, "bf16", (128, 128), ("lse", "tail"), "native"),
    (80, "bf16", (128, 64), (), "native"),
    (256, "bf16", (64, 64), ALL, "native"),
    (128, "bf16", (128, 128), ("lse", "tail"), "int8"),
    (128, "bf16", (128, 128), (), "int8_fp8"),
    (64, "bf16", (128, 64), (), "fp8"),
]
# What the matrix instructions that a precision promises are called in PTX, on Hopper and elsewhere.
INTEGER_PRODUCTS = re.compile(r"(wgmma\.mma_async|mma)\.sync\.aligned\.\w+(\.row\.col)?(\.satfinite)?\.s32\.s8\.s8")
FP8_PRODUCTS = re.compile(r"(wgmma\.mma_async|mma)\.sync\.aligned\.[\w.]*\.e4m3\.e4m3")


@pytest.mark.parametrize(("capability", "configuration"), itertools.product(SHARED_MEMORY, CONFIGURATIONS))
def test_it_compiles_for_every_architecture(capability, configuration, tmp_path):
    from diffsparse.kernels.quantization import PRECISIONS
    from diffsparse.kernels.tuning import tuning

    head_dim, dtype, blocks, options, precision = configuration
    formats = PRECISIONS[precision]
    if "fp8" in (formats.scores, formats.values) and capability < 89:
        pytest.skip("refused there: it does not multiply FP8")
    padded_dim = triton.next_power_of_2(head_dim)
    chosen = tuning(divmod(capability, 10), SHARED_MEMORY[capability], *blocks, padded_dim, precision, 2)
    compiled = compile_for(capability, head_dim, dtype, blocks, chosen, options, precision)
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    if capability == 90:
        assert "wgmma" in compiled.asm["ptx"]
    if capability in (80, 90) and formats.scores == "int8":
        assert INTEGER_PRODUCTS.search(compiled.asm["ptx"])
    if capability in (89, 90) and formats.values == "fp8":
        assert FP8_PRODUCTS.search(compiled.asm["ptx"])
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    # A few registers may be spilled, a tile may not.
    assert int(re.search(r"STACK:(\d+)", usage)[1]) <= 256, usage

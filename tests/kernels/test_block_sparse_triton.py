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


def compile_for(capability, head_dim, dtype, query_block_size, key_block_size, options):
    """Compile the kernel with every option, without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from diffsparse.kernels import block_sparse_triton

    element_size = 4 if dtype == "fp32" else 2
    tuning = block_sparse_triton.tuning(query_block_size, head_dim, element_size, SHARED_MEMORY[capability])
    kernel = block_sparse_triton.attention_kernel
    pointers = {
        **dict.fromkeys(("query_ptr", "key_ptr", "value_ptr", "out_ptr"), f"*{dtype}"),
        **dict.fromkeys(("pooled_key_ptr", "pooled_value_ptr"), f"*{dtype}"),
        **dict.fromkeys(("key_blocks_ptr", "counts_ptr", "key_length_ptr", "has_tail_ptr"), "*i32"),
        "lse_ptr": "*fp32",
        "listed_ptr": "*u8",
    }
    constants = {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": triton.next_power_of_2(head_dim),
        "QUERY_BLOCK": query_block_size,
        "KEY_BLOCK": key_block_size,
        "KEY_TILE": min(tuning.key_tile, key_block_size),
        "TAIL_TILE": min(tuning.key_tile, block_sparse_triton.TAIL_COLUMNS),
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }
    if not options:
        constants |= dict.fromkeys(
            ("key_length_ptr", "has_tail_ptr", "listed_ptr", "pooled_key_ptr", "pooled_value_ptr", "lse_ptr")
        )
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "fp32" if name == "logit_scale" else "i32")
        for name in kernel.arg_names
    }
    # As at a launch: pointers are aligned, and strides of tokens are multiples of 16.
    places = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or "_stride_s" in name]
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


CONFIGURATIONS = [
    (64, "bf16", 64, 64, True),
    (64, "fp16", 128, 128, False),
    (128, "bf16", 64, 64, True),
    (128, "bf16", 128, 64, False),
    (256, "bf16", 64, 64, True),
]


@pytest.mark.parametrize(("capability", "configuration"), itertools.product(SHARED_MEMORY, CONFIGURATIONS))
def test_it_compiles_for_every_architecture(capability, configuration, tmp_path):
    compiled = compile_for(capability, *configuration)
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    if capability == 90:
        assert "wgmma" in compiled.asm["ptx"]
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    # A few registers may be spilled, a tile may not.
    assert int(re.search(r"STACK:(\d+)", usage)[1]) <= 256, usage

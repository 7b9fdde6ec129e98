from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running_products import touched_while_running

from diffsparse.kernels import block_sparse
from diffsparse.kernels.cross_compile_triton import SHARED_MEMORY, compile_attention, machine_code, resources
from diffsparse.kernels.quantization import PRECISIONS

pytest.importorskip("triton")


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


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "query_block_size", "fits"),
    [
        (89, torch.float32, 256, 128, False),
        (89, torch.float32, 256, 64, True),
        (89, torch.float32, 128, 128, True),
        (89, torch.bfloat16, 256, 128, True),
        (80, torch.float32, 256, 128, True),
    ],
)
def test_what_does_not_fit_in_shared_memory_is_refused(
    capability, dtype, head_dim, query_block_size, fits, monkeypatch
):
    from diffsparse.kernels import block_sparse_triton

    properties = SimpleNamespace(shared_memory_per_block_optin=SHARED_MEMORY[capability])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    query = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 1, 300, head_dim))
    reason = block_sparse_triton.why_not(query, query_block_size, 64)
    assert (reason is None) == fits
    assert fits or "shared memory" in reason
    if capability == 89 and dtype == torch.float32 and head_dim == 256:
        compiled = compile_attention(capability, head_dim, "fp32", (query_block_size, 64))
        assert (compiled.metadata.shared <= SHARED_MEMORY[capability]) == fits


@pytest.mark.parametrize("error", [0.1, math.nan, RuntimeError("ptxas is missing")])
def test_a_backend_that_fails_its_self_test_is_not_used(monkeypatch, error):
    def self_test(*args):
        if isinstance(error, Exception):
            raise error
        return error

    monkeypatch.setattr(block_sparse, "self_test", self_test)
    monkeypatch.setattr(block_sparse, "why_not", lambda *args: None)
    block_sparse._why_not_trusted.cache_clear()
    query = torch.empty((1, 1, 64, 64), device="meta")
    with (
        pytest.warns(UserWarning, match=r"backend triton is left out for torch\.float32: its self-test"),
        pytest.raises(ValueError, match="triton: its self-test"),
    ):
        block_sparse.pick_backend("triton", query, 64, 64)
    block_sparse._why_not_trusted.cache_clear()


def test_a_backend_that_is_wrong_in_a_precision_alone_leaves_it_to_the_next(monkeypatch):
    def self_test(name, device, dtype, precision):
        return 1.0 if (name, precision) == ("gluon", "int8") else 0.0

    monkeypatch.setattr(block_sparse, "self_test", self_test)
    monkeypatch.setattr(block_sparse, "why_not", lambda *args: None)
    block_sparse._why_not_trusted.cache_clear()
    query = torch.empty((1, 1, 64, 64), device="meta")
    with pytest.warns(UserWarning, match=r"gluon is left out for torch\.float32, int8: its self-test is off by 1"):
        taken = block_sparse.pick_backend(None, query, 64, 64, "int8")
    assert taken.__name__.endswith("block_sparse_triton")
    assert block_sparse.pick_backend(None, query, 64, 64, "int8_fp8").__name__.endswith("block_sparse_gluon")
    block_sparse._why_not_trusted.cache_clear()


ALL = ("lse", "length", "tail", "order")
CONFIGURATIONS = [
    (64, "bf16", (64, 64), ALL, "native"),
    (64, "fp16", (128, 128), (), "native"),
    (128, "bf16", (64, 64), ALL, "native"),
    (128, "bf16", (128, 128), ("lse", "tail"), "native"),
    (80, "bf16", (128, 64), (), "native"),
    (256, "bf16", (64, 64), ALL, "native"),
    (128, "bf16", (128, 128), ("lse", "tail"), "int8"),
    (128, "bf16", (128, 64), ("lse", "tail"), "int4"),
    (128, "bf16", (128, 128), (), "int8_fp8"),
    (128, "bf16", (128, 128), ("lse", "tail"), "int8_int8"),
    (64, "bf16", (128, 64), (), "fp8"),
    (256, "bf16", (64, 64), (), "int8_int8"),
]
# What the matrix instructions that a precision promises are called in PTX, on Hopper and elsewhere.
INTEGER_PRODUCTS = re.compile(r"(wgmma\.mma_async|mma)\.sync\.aligned\.\w+(\.row\.col)?(\.satfinite)?\.s32\.s8\.s8")
FP8_PRODUCTS = re.compile(r"(wgmma\.mma_async|mma)\.sync\.aligned\.[\w.]*\.e4m3\.e4m3")


@pytest.mark.parametrize(("capability", "configuration"), itertools.product(SHARED_MEMORY, CONFIGURATIONS))
def test_it_compiles_for_every_architecture(capability, configuration):
    head_dim, dtype, blocks, options, precision = configuration
    formats = PRECISIONS[precision]
    if "fp8" in (formats.scores, formats.values) and capability < 89:
        pytest.skip("refused there: it does not multiply FP8")
    compiled = compile_attention(capability, head_dim, dtype, blocks, options, precision)
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    if capability == 90:
        assert "wgmma" in compiled.asm["ptx"]
        assert touched_while_running(machine_code(compiled)) == []
    if capability in (80, 90) and formats.scores in ("int8", "int4"):
        assert INTEGER_PRODUCTS.search(compiled.asm["ptx"])
    if capability in (80, 90) and formats.values == "int8":
        # Means alone are not multiplied as integers.
        assert ("bf16.bf16" in compiled.asm["ptx"]) == ("tail" in options)
    if capability in (89, 90) and formats.values == "fp8":
        assert FP8_PRODUCTS.search(compiled.asm["ptx"])
    # A few registers may be spilled, a tile may not.
    assert resources(compiled).spilled_bytes <= 256


def test_another_resolution_compiles_nothing():
    from diffsparse.kernels.block_sparse_kernel_triton import attention_kernel

    specialized = {p.name for p in attention_kernel.params if not (p.is_constexpr or p.do_not_specialize)}
    # At any resolution these are multiples of 16, and the last one 1.
    strides = {f"{x}_stride_{axis}" for x in ("query", "key", "value", "out") for axis in "bhs"} - {"value_stride_s"}
    numbers = {name for name in specialized if not name.endswith("_ptr")} - {"keys", "values", "logit_scale"}
    assert numbers == strides | {"value_stride", "lists_stride_c"}

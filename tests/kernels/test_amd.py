from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffsparse.eval import doctor, kernels
from diffsparse.kernels import amd
from diffsparse.kernels.backends import available_backends, why_not
from diffsparse.kernels.cross_compile_triton import OF_AMD, compile_attention, resources
from diffsparse.kernels.first_use import kernels_on
from diffsparse.kernels.quantization import PRECISIONS
from diffsparse.kernels.tuning import Tuning

pytest.importorskip("triton")
GPU = torch.device("cuda", 0)
ALL = ("lse", "length", "tail", "order")
QUERY = SimpleNamespace(device=GPU, dtype=torch.bfloat16, shape=(1, 1, 300, 128))


@pytest.fixture
def gpu_of_amd(monkeypatch):
    """Makes the GPU one of an architecture of AMD; its compute capability is what PyTorch says of a GPU of gfx942."""

    def make(name):
        monkeypatch.setattr(torch.version, "hip", "7.1")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
        properties = SimpleNamespace(gcnArchName=f"{name}:sramecc+:xnack-", major=9, minor=4)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return make


def test_only_a_gpu_of_amd_has_an_architecture(gpu_of_amd):
    assert amd.architecture(GPU) is None
    gpu_of_amd("gfx942")
    assert amd.architecture(GPU) == "gfx942"
    assert amd.architecture(torch.device("cpu")) is None


@pytest.mark.parametrize("name", OF_AMD)
def test_triton_computes_there_and_gluon_does_not(name, gpu_of_amd):
    gpu_of_amd(name)
    taken = {precision: why_not("triton", QUERY, 128, 64, precision) is None for precision in PRECISIONS}
    multiplies_fp8 = name in ("gfx950", "gfx1201")
    assert taken == {precision: "fp8" not in precision or multiplies_fp8 for precision in PRECISIONS}
    assert "ROCm" in why_not("gluon", QUERY, 128, 64)


def test_a_gpu_without_matrix_instructions_is_told_so(gpu_of_amd):
    gpu_of_amd("gfx1030")
    assert "gfx1030 has no matrix instructions" in why_not("triton", QUERY, 128, 64)


def test_the_limits_of_blocks_and_heads_are_the_same(gpu_of_amd):
    gpu_of_amd("gfx1100")
    assert "query block of 96" in why_not("triton", QUERY, 96, 64)
    wide = SimpleNamespace(**vars(QUERY) | {"shape": (1, 1, 300, 288)})
    assert "head dim 288" in why_not("triton", wide, 128, 64)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "fits"), [("fp32", 256, False), ("fp32", 128, True), ("bf16", 256, True)]
)
def test_what_does_not_fit_in_shared_memory_is_refused(dtype, head_dim, fits, gpu_of_amd):
    gpu_of_amd("gfx942")
    of_query = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    query = SimpleNamespace(device=GPU, dtype=of_query, shape=(1, 1, 300, head_dim))
    reason = why_not("triton", query, 64, 64)
    assert (reason is None) == fits
    assert fits or "shared memory" in reason
    compiled = compile_attention("gfx942", head_dim, dtype, (64, 64), ALL)
    assert (compiled.metadata.shared <= amd.SHARED_MEMORY) == fits


def test_it_is_compiled_as_for_amd_and_named_so(gpu_of_amd):
    from diffsparse.kernels import block_sparse_triton

    gpu_of_amd("gfx1100")
    chosen = block_sparse_triton._tuning(QUERY, 128, 64, "native")
    assert chosen == amd.tuning("gfx1100", 128, 64, 128, "native") == Tuning(16, 8, 1)
    assert doctor.architecture(0) == "gfx1100"


def test_the_command_names_what_it_can_compile_for(capsys):
    with pytest.raises(ValueError, match=r"among \[80.*'gfx942'.*got \['gfx906'\]"):
        kernels.run(SimpleNamespace(capabilities=[90, "gfx906"]))
    assert capsys.readouterr().out == ""


def test_planning_is_left_to_torch(gpu_of_amd):
    gpu_of_amd("gfx942")
    assert kernels_on(GPU, "lists_triton", "lists", lambda module: True) is None


# Both head dims, block sizes and options that a model meets by default.
CONFIGURATIONS = [
    (128, "bf16", (128, 64), ALL, "native"),
    (64, "fp16", (64, 64), ("tail", "order"), "native"),
    (128, "bf16", (128, 64), ("tail", "order"), "int8"),
]
KINDS = {"gfx942": "mfma", "gfx1100": "wmma", "gfx1201": "wmma"}


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_it_compiles_without_spilling(name, configuration):
    taken = resources(compile_attention(name, *configuration))
    assert taken.spilled_bytes == 0
    assert 0 < taken.shared_bytes <= amd.SHARED_MEMORY
    types = [("bf16" if configuration[1] == "bf16" else "f16")] + ["8"] * (configuration[4] == "int8")
    assert len(taken.products) == len(types)
    for product, number in zip(taken.products, types):
        assert product.startswith(KINDS[name])
        assert product.endswith(number)


@pytest.mark.gpu
@pytest.mark.skipif(torch.version.hip is None or not torch.cuda.is_available(), reason="there is no GPU of AMD")
def test_a_gpu_of_amd_passes_its_self_test():
    assert available_backends("cuda")["triton"] is None

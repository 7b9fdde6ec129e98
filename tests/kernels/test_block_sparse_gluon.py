from __future__ import annotations

import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

# Of a program on compute capability 9.0: NVIDIA, CUDA C++ Programming Guide, technical specifications.
SHARED_MEMORY = 227 * 1024


@pytest.fixture(scope="module")
def gluon():
    from diffsparse.kernels import block_sparse_gluon

    return block_sparse_gluon


def test_what_it_cannot_take_has_a_reason(gluon):
    assert "CUDA" in gluon.why_not(torch.zeros(1, 1, 128, 64), 128, 64)


@pytest.mark.parametrize("option", [{"tail": torch.ones(1, 1, dtype=torch.bool)}, {"scale": -1.0}])
def test_the_triton_kernel_does_what_it_cannot(gluon, monkeypatch, option):
    monkeypatch.setattr(gluon.block_sparse_triton, "attend", lambda *args, **options: (args, options))
    options = {"query_block_size": 128, "key_block_size": 64, "key_length": None, "tail": None, "scale": 1.0}
    options |= {"return_lse": True, **option}
    tensors = (torch.zeros(1, 1, 128, 64),) * 5
    given, given_options = gluon.attend(*tensors, **options)
    assert given == tensors
    assert given_options == options


def test_views_are_copied_from_where_they_lie(gluon):
    projected = torch.zeros(2, 300, 4, 128, dtype=torch.bfloat16)
    of_one_row = torch.zeros(1, 300, 4, 128, dtype=torch.bfloat16).as_strided((1, 4, 300, 128), (3, 128, 512, 1))
    for x in (projected.transpose(1, 2), projected.permute(0, 2, 1, 3)[:1, 1:], of_one_row):
        descriptor = gluon._descriptor(x, 64)
        assert descriptor.base is x
        assert [s for s, size in zip(descriptor.strides, x.shape) if size > 1] == [
            s for s, size in zip(x.stride(), x.shape) if size > 1
        ]


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: x[..., :128].expand(2, -1, -1, -1),  # a stride of 0
        lambda x: x[..., 1:129],  # starts at 2 bytes
        lambda x: x.mT.contiguous().mT[..., :128],  # no stride of 1
    ],
)
def test_views_that_the_copy_engine_cannot_take_are_copied_first(gluon, odd):
    x = odd(torch.randn(1, 4, 40, 136).bfloat16())
    descriptor = gluon._descriptor(x, 64)
    assert all(stride % 8 == 0 for stride in descriptor.strides[:3])
    assert descriptor.base.data_ptr() % 16 == 0
    assert torch.equal(descriptor.base, x)


def compile_for_hopper(gluon, head_dim, dtype, key_block_size, return_lse, stride):
    """Compile the kernel without a GPU. Triton makes constants of arguments that are 1: with `stride` 1, some are."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = gluon.attention_kernel
    rows = {"query_desc": 64, "key_desc": key_block_size, "value_desc": key_block_size, "out_desc": 64}
    layout = repr(gluon.SHARED_LAYOUT.value)
    types = {name: f"tensordesc<{dtype}[1, 1, {n}, {head_dim}],{layout}>" for name, n in rows.items()}
    types |= {"key_blocks_ptr": "*i32", "counts_ptr": "*i32", "lse_ptr": "*fp32", "logit_scale": "fp32"}
    constants = {
        "HEAD_DIM": head_dim,
        "KEY_BLOCK": key_block_size,
        "STAGES": gluon.STAGES[head_dim],
        "TAKE_TURNS": gluon.TAKE_TURNS,
    }
    if stride == 1:
        constants |= dict.fromkeys(("lists_stride_c", "counts_stride_q", "heads", "num_queries", "num_keys"), 1)
    if not return_lse:
        constants["lse_ptr"] = None
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    places = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    source = GluonASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in places}
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


@pytest.mark.parametrize(
    "configuration", [(128, "bf16", 128, True, 1), (128, "fp16", 64, False, 2), (64, "bf16", 64, True, 1)]
)
def test_it_compiles_without_spilling_and_overlaps_softmax_with_products(gluon, configuration, tmp_path):
    compiled = compile_for_hopper(gluon, *configuration)
    assert compiled.metadata.shared <= SHARED_MEMORY
    assert compiled.metadata.num_warps == 12  # two warpgroups, and one around the copying warp
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage, code = (
        subprocess.run([tool, what, binary], capture_output=True, text=True, check=True).stdout
        for what in ("--dump-resource-usage", "-sass")
    )
    assert re.search(r"STACK:0 .* LOCAL:0 ", usage), usage
    # Both warpgroups take the exponentials of a tile between the end of its first product and that of the other one.
    between = re.findall(r"DEPBAR.LE gsb0, 0x1 ;.*?DEPBAR.LE gsb0, 0x0 ;", code, re.DOTALL)
    assert [part.count("MUFU.EX2") >= 64 for part in between] == [True, True]

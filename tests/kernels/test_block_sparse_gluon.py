from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from running_products import touched_while_running

from diffsparse.kernels import backends, quantization, self_test
from diffsparse.kernels.cross_compile_triton import machine_code, resources
from diffsparse.kernels.launch import FUSION
from diffsparse.kernels.quantization import PRECISIONS

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


@pytest.mark.parametrize(("version", "is_new_enough"), [("3.5.1", False), ("3.6.0", True), ("3.10.0+cu130", True)])
def test_an_older_triton_is_said_to_be_too_old(gluon, monkeypatch, version, is_new_enough):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(gluon.triton, "__version__", version)
    query = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 1, 128, 64))
    why = None if is_new_enough else "it needs Triton 3.6 or newer, this is 3.5.1"
    assert gluon.why_not(query, 128, 64) == why


@pytest.mark.parametrize("option", [{"precision": "int4"}, {"scale": -1.0}])
def test_the_triton_kernel_does_what_it_cannot(gluon, monkeypatch, option):
    monkeypatch.setattr(gluon.block_sparse_triton, "attend", lambda *args, **options: (args, options))
    options = {"query_block_size": 128, "key_block_size": 64, "key_length": None, "tail": None, "scale": 1.0}
    options |= {
        "return_lse": True,
        "precision": "native",
        "query_order": None,
        "key_order": torch.zeros(1, 128),
        "schedule": torch.zeros(1),
        **option,
    }
    tensors = (torch.zeros(1, 1, 128, 64),) * 5
    given, given_options = gluon.attend(*tensors, **options)
    assert given == tensors
    assert given_options == options


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_says_what_it_leaves_to_the_triton_kernel(gluon, monkeypatch, precision):
    from diffsparse.kernels.operands_triton import Operands

    monkeypatch.setattr(gluon.block_sparse_triton, "attend", lambda *args, **options: "triton")
    monkeypatch.setattr(gluon, "launch", lambda *args, **options: (None, None))
    x = torch.ones(1, 1, 128, 64)
    lists = torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 1, dtype=torch.int32)
    options = {"query_block_size": 128, "key_length": None, "tail": None, "scale": 1.0, "return_lse": False}
    monkeypatch.setattr(gluon, "prepared", lambda *args, **options: Operands(x, x, x))
    given = gluon.attend(x, x, x, *lists, key_block_size=64, precision=precision, **options)
    assert backends.left_to("gluon", precision) == ("triton" if given == "triton" else None)
    assert (given == "triton") == (precision in ("int8_int8", "int4"))


def test_a_backend_that_says_nothing_of_it_leaves_nothing_to_others():
    assert backends.left_to("eager", "int8") is None


def test_views_are_copied_from_where_they_lie(gluon):
    projected = torch.zeros(2, 300, 4, 128, dtype=torch.bfloat16)
    of_one_row = torch.zeros(1, 300, 4, 128, dtype=torch.bfloat16).as_strided((1, 4, 300, 128), (3, 128, 512, 1))
    for x in (projected.transpose(1, 2), projected.permute(0, 2, 1, 3)[:1, 1:], of_one_row):
        descriptor = gluon._descriptor(x, 64, 128)
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
    descriptor = gluon._descriptor(x, 64, 128)
    assert all(stride % 8 == 0 for stride in descriptor.strides[:3])
    assert descriptor.base.data_ptr() % 16 == 0
    assert torch.equal(descriptor.base, x)


@pytest.mark.parametrize("key_block_size", [64, 128])
def test_the_self_test_has_every_option(gluon, key_block_size):
    blocks = gluon.QUERY_BLOCK, key_block_size
    cases = [case for case in self_test._SELF_TEST_CASES if (case.query_block_size, case.key_block_size) == blocks]
    assert {case.head_dim for case in cases} == set(gluon.HEAD_DIMS)
    for option in ("has_tail", "has_length", "has_orders"):
        assert any(getattr(case, option) for case in cases)
    # Half of the blocks are listed: more tiles than a ring has.
    longest = max(cases, key=lambda case: case.num_tokens)
    assert longest.num_tokens / 2 / 128 > gluon.STAGES[longest.head_dim, 1, 1]


def test_values_beyond_the_length_are_zeros_to_the_kernel(gluon, monkeypatch):
    monkeypatch.setattr(gluon, "launch", lambda operands, *_, **options: (operands.value, None))
    x = torch.ones(2, 1, 128, 64)
    x[0, :, 70:] = torch.nan
    lists = torch.zeros(2, 1, 1, 1, dtype=torch.int32), torch.ones(2, 1, 1, dtype=torch.int32)
    options = {"query_block_size": 128, "key_block_size": 64, "scale": 1.0, "return_lse": False, "tail": None}
    value, _ = gluon.attend(x, x, x, *lists, key_length=torch.tensor([70, 128]), **options)
    assert torch.equal(value, x.nan_to_num(0.0))


def test_fp8_values_lie_in_the_order_of_the_weights_that_a_thread_holds():
    weights, value = torch.randint(9, (64, 32)).float(), torch.randint(-9, 10, (1, 1, 8, 32)).float()
    interleaved = quantization.interleaved(value)
    # Of 16 logits of a row in a product, thread q of four holds 2q, 2q + 1, 2q + 8 and 2q + 9: NVIDIA, PTX ISA, wgmma.
    held = [16 * (i // 16) + 2 * (i % 16 // 4) + (0, 1, 8, 9)[i % 4] for i in range(32)]
    assert torch.equal(weights[:, held] @ interleaved[0, 0].T, weights @ value[0, 0].T)


def compile_for_hopper(gluon, head_dim, dtypes, key_block_size, options):
    """Compile the kernel without a GPU. `dtypes` are of queries and keys, and of values.

    `options` are those of "lse", "tail", "length" and "order" that it is to have.
    """
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = gluon.attention_kernel
    sizes = {"bf16": 2, "fp16": 2, "i8": 1, "fp8e4nv": 1}
    scores, values = dtypes
    result = values if sizes[values] == 2 else "bf16"
    tiles = {"key_desc": (scores, key_block_size)}
    tiles |= {"pooled_key_desc": (result, 128), "pooled_value_desc": (result, 128)}
    tiles = {name: (dtype, rows, head_dim) for name, (dtype, rows) in tiles.items()}
    tiles["value_desc"] = (values, *((key_block_size, head_dim) if sizes[values] == 2 else (head_dim, key_block_size)))
    types = {
        name: f"tensordesc<{dtype}[1, 1, {rows}, {columns}],{gluon.descriptor_layout(sizes[dtype], columns)!r}>"
        for name, (dtype, rows, columns) in tiles.items()
    }
    types |= dict.fromkeys(("key_blocks_ptr", "counts_ptr", "schedule_ptr", "key_length_ptr", "has_tail_ptr"), "*i32")
    types |= dict.fromkeys(("query_scale_ptr", "key_scale_ptr", "value_scale_ptr", "lse_ptr"), "*fp32")
    types |= {"tail_logs_ptr": "*fp32", "logit_scale": "fp32", "query_order_ptr": "*i64"}
    types |= {"query_ptr": f"*{scores}", "out_ptr": f"*{result}"}
    constants = {"HEAD_DIM": head_dim, "KEY_BLOCK": key_block_size}
    constants["STAGES"] = gluon.STAGES[head_dim, sizes[scores], sizes[values]]
    for is_there, names in (
        ("lse" in options, ("lse_ptr",)),
        ("length" in options, ("key_length_ptr",)),
        ("order" in options, ("query_order_ptr",)),
        ("tail" in options, ("has_tail_ptr", "tail_logs_ptr", "pooled_key_desc", "pooled_value_desc")),
        (sizes[scores] == 1, ("query_scale_ptr", "key_scale_ptr")),
        (sizes[values] == 1, ("value_scale_ptr",)),
    ):
        if not is_there:
            constants |= dict.fromkeys(names)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    # As at a launch: pointers are aligned, and the strides of query and output are multiples of 16.
    aligned = [name for name in kernel.arg_names if signature[name][0] == "*" or re.match("(query|out)_stride", name)]
    places = [kernel.arg_names.index(name) for name in aligned]
    source = GluonASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in places}
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4} | FUSION)


@pytest.mark.parametrize(
    "configuration",
    [
        (128, ("bf16", "bf16"), 128, ["lse"]),
        (128, ("bf16", "bf16"), 128, ["order"]),
        (128, ("fp16", "fp16"), 64, ["length"]),
        (128, ("bf16", "bf16"), 128, ["tail", "order"]),
        (64, ("bf16", "bf16"), 64, ["lse", "tail", "length", "order"]),
        (128, ("fp8e4nv", "fp8e4nv"), 128, ["tail"]),
        (64, ("i8", "fp8e4nv"), 128, ["lse"]),
        (128, ("i8", "bf16"), 128, ["length"]),
        (128, ("i8", "fp8e4nv"), 64, ["order"]),
        (128, ("i8", "bf16"), 64, ["tail", "order"]),
        (64, ("fp8e4nv", "fp8e4nv"), 64, ["lse", "tail", "length", "order"]),
    ],
    ids=str,
)
def test_it_compiles_without_spilling_and_overlaps_softmax_with_products(gluon, configuration):
    compiled = compile_for_hopper(gluon, *configuration)
    assert compiled.metadata.shared <= SHARED_MEMORY
    assert compiled.metadata.num_warps == 12  # two warpgroups, and one around the copying warp
    used, code = resources(compiled), machine_code(compiled)
    assert used.spilled_bytes == 0
    assert touched_while_running(code) == []
    # Both warpgroups take the exponentials of a tile between the end of its first product and that of the others, of
    # which FP8 has two for two blocks: in the loop over listed tiles and in that over means that are not quantized.
    head_dim, (scores, values), key_block_size, options = configuration
    num_others = 2 if values == "fp8e4nv" and key_block_size == 64 else 1
    between = re.findall(rf"DEPBAR.LE gsb0, 0x{num_others} ;.*?DEPBAR.LE gsb0, 0x0 ;", code, re.DOTALL)
    num_loops = 2 if "tail" in options and scores == values != "fp8e4nv" else 1
    assert [part.count("MUFU.EX2") >= 64 for part in between] == [True, True] * num_loops
    # A logarithm takes a dozen instructions: none is found for each mean.
    assert compiled.asm["ttgir"].count("math.log2") == (2 if "lse" in options else 0)
    # A row of the output is written by 16 bytes.
    assert set(re.findall(r"STG\.E\.?(\w*)", code)) - {""} == {"128"}
    # The products read tiles as the copy engine swizzles them: in the last two bits of a descriptor 1 is by 128 bytes,
    # 2 by 64. NVIDIA, PTX ISA, matrix descriptors.
    rows = {head_dim * (1 if scores in ("i8", "fp8e4nv") else 2), key_block_size if values == "fp8e4nv" else 128}
    rows |= {128} if "tail" in options else set()
    found = {int(number) >> 62 & 3 for number in re.findall(r"or\.b64[^;]*, (-?\d{15,});", compiled.asm["ptx"])}
    assert found == {1 if row >= 128 else 2 for row in rows}
    if values == "fp8e4nv":
        # No byte goes to another place in the main loop, which is the only one of a kernel without an end to the list.
        assert "PRMT" not in code or "tail" in options

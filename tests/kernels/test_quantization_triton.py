from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffsparse.kernels.pooling import block_means

triton = pytest.importorskip("triton")


def test_it_keeps_to_the_specification_in_the_interpreter():
    file = Path(__file__).with_name("interpreted_quantization_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


def compile_for(capability, kernel, pointers, constants, num_elements):
    """Compile the kernel with every option, without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from diffsparse.kernels.launch import FUSION
    from diffsparse.kernels.quantization_triton import num_warps

    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    # As at a launch: pointers are aligned, and strides and padded tokens multiples of 16.
    even = re.compile(r"\w+_ptr|(x|value)_stride_\w|padded_tokens").fullmatch
    places = [i for i, name in enumerate(kernel.arg_names) if even(name)]
    return triton.compile(
        ASTSource(
            fn=kernel,
            signature=signature,
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in places},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps(num_elements)} | FUSION,
    )


def compile_blocks(capability, number, head_dim, block_size):
    from diffsparse.kernels import quantization_triton

    stored = {"int8": "*i8", "int4": "*u8", "fp8": "*fp8e4nv"}[number]
    width = -(-head_dim // 2) if number == "int4" else head_dim
    padded = triton.next_power_of_2(width)
    return compile_for(
        capability,
        quantization_triton.quantize_blocks_kernel,
        {
            "x_ptr": "*bf16",
            "order_ptr": "*i64",
            "mean_ptr": "*fp32",
            "key_length_ptr": "*i32",
            "values_ptr": stored,
            "scales_ptr": "*fp32",
            "means_ptr": "*bf16",
        },
        {
            "HEAD_DIM": head_dim,
            "WIDTH": width,
            "PADDED_WIDTH": padded,
            "BLOCK": block_size,
            "LARGEST": quantization_triton.LARGEST[number],
        },
        block_size * padded * (2 if number == "int4" else 1),
    )


def compile_values(capability, name, head_dim, block_size):
    from diffsparse.kernels import quantization_triton

    channels = min(triton.next_power_of_2(head_dim), quantization_triton.MAX_CHANNELS)
    return compile_for(
        capability,
        getattr(quantization_triton, name),
        {
            "value_ptr": "*bf16",
            "order_ptr": "*i64",
            "key_length_ptr": "*i32",
            "absmax_ptr": "*fp32",
            "stretch_ptr": "*fp32",
            "values_ptr": "*fp8e4nv",
            "means_ptr": "*bf16",
        },
        {"HEAD_DIM": head_dim, "CHANNELS": channels, "BLOCK": block_size}
        | ({"INTERLEAVE": True} if name == "quantize_values_kernel" else {}),
        block_size * channels,
    )


def assert_no_spills(compiled, folder):
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    assert int(re.search(r"STACK:(\d+)", usage)[1]) == 0, usage


# FP8 needs compute capability 8.9.
@pytest.mark.parametrize(
    ("capability", "number"),
    [
        (80, "int8"),
        (89, "fp8"),
        (90, "fp8"),
        (120, "int8"),
        (120, "int4"),
    ],
)
@pytest.mark.parametrize(("head_dim", "block_size"), [(96, 128), (256, 128)])
def test_blocks_compile_for_every_architecture(capability, number, head_dim, block_size, tmp_path):
    assert_no_spills(compile_blocks(capability, number, head_dim, block_size), tmp_path)


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        (90, "channel_absmax_kernel"),
        (89, "quantize_values_kernel"),
        (90, "quantize_values_kernel"),
        (120, "quantize_values_kernel"),
    ],
)
@pytest.mark.parametrize(("head_dim", "block_size"), [(96, 128), (256, 128)])
def test_values_compile_for_every_architecture(capability, name, head_dim, block_size, tmp_path):
    compiled = compile_values(capability, name, head_dim, block_size)
    # What a program may use at the least, on compute capability 8.9 and 12.0.
    assert compiled.metadata.shared <= 99 * 1024
    if name == "quantize_values_kernel":
        assert "st.global.v4.b32" in compiled.asm["ptx"]  # tokens lie side by side
    assert_no_spills(compiled, tmp_path)


def steps_apart(actual, expected):
    """How many representable numbers lie between the integers or e4m3 values of both."""
    if expected.dtype.is_floating_point:
        # The bits of a float without its sign count up as its values do.
        actual, expected = (x.view(torch.uint8).int() for x in (actual, expected))
        actual, expected = (torch.where(x > 127, 128 - x, x) for x in (actual, expected))
    return (actual.int() - expected.int()).abs()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("number", ["int8", "int4", "fp8", "values"])
@pytest.mark.parametrize("head_dim", [64, 128, 96, 256])
def test_a_gpu_rounds_as_the_specification_does(number, head_dim):
    from diffsparse.kernels import quantization, quantization_triton

    if number in ("fp8", "values") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    generator = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn((2, 1000, 3, head_dim), generator=generator, device="cuda").bfloat16().transpose(1, 2)
    length = torch.tensor([1000, 700], dtype=torch.int32, device="cuda")
    places = torch.rand((3, 700), generator=generator, device="cuda").argsort(-1)
    order = torch.cat([places, torch.arange(700, 1000, device="cuda").expand(3, -1)], dim=1)
    in_order = x.gather(2, order[None, :, :, None].expand(2, -1, -1, head_dim))
    if number == "values":
        actual = quantization_triton.quantize_values(x, 64, "fp8", order=order, key_length=length, pool=True)
        values, scales = quantization.quantize_values(in_order, "fp8", length)
        means = block_means(in_order, 64, length)[0]
    else:
        mean = quantization.key_mean(x, length)
        actual = quantization_triton.quantize_blocks(
            x, 64, number, order=order, mean=mean, key_length=length, pool=True
        )
        smooth = in_order.float() - mean
        means = block_means(smooth, 64, length)[0]
        if number == "fp8":
            values, scales = quantization.quantize_blocks_fp8(smooth, 64, length)
        else:
            values, scales = quantization.quantize_blocks(smooth, 64, {"int8": 8, "int4": 4}[number], length)
    stored = quantization.unpack_int4(actual.values, head_dim) if number == "int4" else actual.values
    apart = steps_apart(stored, values)
    # Only what a rounding in fp32 takes to the other side of a half.
    assert apart.max() <= 1
    assert apart.float().mean() < 1e-4
    torch.testing.assert_close(actual.scales, scales, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual.means.float(), means, rtol=2.0**-8, atol=1e-6)

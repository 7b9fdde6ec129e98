"""`diffsparse kernels`: what the Triton attention kernel takes on every architecture, compiled without a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import itertools

CONFIGURATIONS = [
    (head_dim, blocks, precision)
    for head_dim in (64, 128)
    for blocks in ((128, 64), (128, 128))
    for precision in ("native", "int8", "int8_int8", "int8_fp8", "fp8", "int4")
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which architectures."""
    parser.add_argument(
        "--capabilities",
        type=_architecture,
        nargs="+",
        default=[80, 86, 89, 90, 100, 120],
        metavar="CC",
        help="compute capabilities, 90 for 9.0, and architectures of AMD, like gfx942 (default: 80 86 89 90 100 120)",
    )


def run(args: argparse.Namespace) -> int:
    """Compile, and print a Markdown table."""
    from diffsparse.kernels import amd
    from diffsparse.kernels.cross_compile_triton import OF_AMD, SHARED_MEMORY, compile_attention, resources
    from diffsparse.kernels.quantization import PRECISIONS

    memory = SHARED_MEMORY | dict.fromkeys(OF_AMD, amd.SHARED_MEMORY)
    unknown = [architecture for architecture in args.capabilities if architecture not in memory]
    if unknown:
        raise ValueError(f"`--capabilities` must be among {list(memory)}, got {unknown}.")
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "`diffsparse kernels` compiles with triton, which is not installed. PyTorch brings it on Linux; for "
            "Windows there is the package triton-windows."
        )
    print("| sm | head dim | blocks | precision | registers | spilled bytes | shared KiB, of | matrix instructions |")
    print("|---|---|---|---|---|---|---|---|")
    for architecture, (head_dim, blocks, precision) in itertools.product(args.capabilities, CONFIGURATIONS):
        if isinstance(architecture, str):
            is_refused = amd.why_not(architecture, precision) is not None
        else:
            formats = PRECISIONS[precision]
            is_refused = "fp8" in (formats.scores, formats.values) and architecture < 89
        if is_refused:
            continue
        used = resources(compile_attention(architecture, head_dim, "bf16", blocks, (), precision))
        print(
            f"| {architecture} | {head_dim} | {blocks[0]} x {blocks[1]} | {precision} | {used.registers} | "
            f"{used.spilled_bytes} | {used.shared_bytes // 1024}, {memory[architecture] // 1024} | "
            f"{', '.join(used.products)} |",
            flush=True,
        )
    return 0


def _architecture(name: str) -> int | str:
    if name.startswith("gfx"):
        return name
    if name.isdecimal():
        return int(name)
    raise argparse.ArgumentTypeError(f"expected a compute capability like 90, or AMD's name like gfx942, got {name!r}")

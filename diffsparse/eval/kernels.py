"""`diffsparse kernels`: what the Triton attention kernel takes on every architecture, compiled without a GPU."""

from __future__ import annotations

import argparse
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
        type=int,
        nargs="+",
        default=[80, 86, 89, 90, 100, 120],
        metavar="CC",
        help="compute capabilities, 90 for 9.0 (default: 80 86 89 90 100 120)",
    )


def run(args: argparse.Namespace) -> int:
    """Compile, and print a Markdown table."""
    from diffsparse.kernels.cross_compile_triton import SHARED_MEMORY, compile_attention, resources
    from diffsparse.kernels.quantization import PRECISIONS

    unknown = sorted(set(args.capabilities) - set(SHARED_MEMORY))
    if unknown:
        raise ValueError(f"`--capabilities` must be among {sorted(SHARED_MEMORY)}, got {unknown}.")
    print("| sm | head dim | blocks | precision | registers | spilled bytes | shared KiB, of | matrix instructions |")
    print("|---|---|---|---|---|---|---|---|")
    for capability, (head_dim, blocks, precision) in itertools.product(args.capabilities, CONFIGURATIONS):
        formats = PRECISIONS[precision]
        if "fp8" in (formats.scores, formats.values) and capability < 89:
            continue
        used = resources(compile_attention(capability, head_dim, "bf16", blocks, (), precision))
        print(
            f"| {capability} | {head_dim} | {blocks[0]} x {blocks[1]} | {precision} | {used.registers} | "
            f"{used.spilled_bytes} | {used.shared_bytes // 1024}, {SHARED_MEMORY[capability] // 1024} | "
            f"{', '.join(used.products)} |",
            flush=True,
        )
    return 0

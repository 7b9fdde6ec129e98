"""`diffsparse bench`: how fast sparse attention is against dense attention on this machine.

Dense and sparse calls take turns in one run, so that whatever else the machine does slows both alike.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsparse.eval.bench_plot import draw
from diffsparse.eval.bench_suite import SUITES, run_suite
from diffsparse.eval.bench_table import as_markdown
from diffsparse.eval.output_file import check_output_file, reading, write_json

if TYPE_CHECKING:
    import torch
    from rich.console import Console

DTYPES = ("float32", "bfloat16", "float16")
OF_ONE_SIZE: dict[str, Any] = {
    "tokens": 8192,
    "heads": 2,
    "head_dim": 64,
    "densities": [0.25, 0.1],
    "dtypes": ["float32", "bfloat16"],
    "blocks": ["128x128"],
}
"""Options that a suite has no use for, with their defaults."""


@dataclass(frozen=True)
class AttentionCase:
    """One attention call: random inputs, random lists of key blocks."""

    tokens: int
    heads: int
    head_dim: int
    dtype: str
    query_block_size: int
    key_block_size: int
    density: float
    ragged: bool  # counts from one block to twice the mean, or all equal
    tail: bool  # skipped blocks enter pooled, in every head

    def backend(self, device: torch.device) -> str:
        """The fastest backend that takes it, whether or not it is right."""
        import torch

        from diffsparse.kernels.backends import BACKENDS, why_not

        query = torch.empty((1, 1, 1, self.head_dim), dtype=getattr(torch, self.dtype), device=device)
        blocks = self.query_block_size, self.key_block_size
        return next(name for name in BACKENDS if why_not(name, query, *blocks) is None)


@dataclass(frozen=True)
class Speed:
    """One case measured: medians over the repeats, the speed-up over pairs of neighbouring calls."""

    case: AttentionCase
    backend: str
    executed_density: float
    dense_seconds: float
    sparse_seconds: float
    speed_up: float

    @property
    def share_of_linear(self) -> float:
        """1 where a quarter of the blocks takes a quarter of the time."""
        return self.speed_up * self.executed_density


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shapes to measure and where to write."""
    parser.add_argument("--tokens", type=int, help="tokens of the sequence (default: %(default)s)")
    parser.add_argument("--heads", type=int, help="attention heads (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, help="numbers per head (default: %(default)s)")
    parser.add_argument("--densities", type=float, nargs="+", help="shares of key blocks (default: 0.25 0.1)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: float32 bfloat16")
    parser.add_argument(
        "--blocks",
        nargs="+",
        metavar="QUERYxKEY",
        help="block sizes in tokens, of query and key (default: 128x128)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="pairs of calls per case (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: what torch takes)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--suite",
        choices=SUITES,
        help="instead of one size, those of real models against all attention at hand, dense and block-sparse: `gpu`, "
        "or `tiny` to try; goes on with what an existing --output lacks",
    )
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="measure nothing: print a suite's results as Markdown"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="with --table, also draw speed-up against density: a PNG"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("diffsparse_bench.json"), help="JSON file to write (default: %(default)s)"
    )
    parser.set_defaults(**OF_ONE_SIZE)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON file; 1 if the kernel is wrong and its speed was not measured."""
    import torch
    from rich.console import Console

    from diffsparse.eval.bench_planning import bench_planning, grid_of
    from diffsparse.eval.environment import describe_machine
    from diffsparse.eval.generate import choose_device
    from diffsparse.kernels.self_test import largest_error, self_test

    if args.plot is not None:
        if args.table is None:
            raise ValueError(f"`--plot` {args.plot} draws the results that `--table` names, and there is no `--table`.")
        check_output_file("`--plot`", args.plot)
    _check_of_one_size(args)
    if args.table is not None:
        _show(args.table, args.plot)
        return 0
    console = Console()
    cases = make_cases(args)
    check_output_file("`--output`", args.output)
    device = torch.device(choose_device(args.device))
    threads_before = torch.get_num_threads()
    try:
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        if args.suite is not None:
            # Messages of others are no markup.
            say = functools.partial(console.print, markup=False)
            run_suite(args.suite, args.output, device, say, args.repeats)
            console.print(f"Written to {args.output}")
            return 0
        backends = {case: case.backend(device) for case in cases}
        errors: dict[str, float] = {}
        for backend, dtype in sorted({(backends[case], case.dtype) for case in cases}):
            error = self_test(backend, device, getattr(torch, dtype))
            # Not `error > ...`, which is false for an error that is not a number.
            if not error <= largest_error(getattr(torch, dtype), "native"):
                console.print(
                    f"The backend {backend} is wrong by {error:.1e} in {dtype}, so its speed was not measured."
                )
                return 1
            errors[f"{backend} {dtype}"] = error
        speeds = [bench_attention(case, args.repeats, device, backends[case]) for case in cases]
        print_speeds(speeds, console)
        overheads = {
            dtype: bench_planning(
                grid_of(args.tokens), args.heads, args.head_dim, dtype, args.densities[0], args.repeats, device
            )
            for dtype in args.dtypes
        }
        for dtype, overhead in overheads.items():
            console.print(
                f"{dtype}: planning {overhead.plan_seconds:.3f} s, kept {overhead.replan_every} steps; "
                f"permuting {overhead.permute_seconds:.3f} s; together {overhead.share_of_dense:.1%} of the dense call"
            )
        record = {
            "machine": describe_machine(device),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "arguments": {
                name: value for name, value in vars(args).items() if isinstance(value, (int, float, str, list))
            },
            "self_test_errors": errors,
            "planning": {
                dtype: {**asdict(overhead), "share_of_dense": overhead.share_of_dense}
                for dtype, overhead in overheads.items()
            },
            "attention": [{**asdict(speed), "share_of_linear": speed.share_of_linear} for speed in speeds],
        }
    finally:
        torch.set_num_threads(threads_before)
    write_json(args.output, record)
    console.print(f"Written to {args.output}")
    return 0


def _check_of_one_size(args: argparse.Namespace) -> None:
    """Raise ValueError where an option would be passed over without a word."""
    other = "table" if args.table is not None else "suite"
    if (value := getattr(args, other)) is None:
        return
    for name, default in OF_ONE_SIZE.items():
        if (given := getattr(args, name)) != default:
            text = " ".join(map(str, given)) if isinstance(given, list) else given
            raise ValueError(
                f"`--{name.replace('_', '-')}` {text} is of one size, and `--{other}` {value} has sizes of its own. "
                f"Leave one of the two out."
            )


def _show(file: Path, plot: Path | None) -> None:
    """Print the results of a suite in a file as Markdown, and draw them."""
    with reading(f"`--table` {file} holds no results of a suite", "Name what `diffsparse bench --suite` has written."):
        record = json.loads(file.read_text(encoding="utf-8"))
        table = as_markdown(record)
    print(table, end="")
    if plot is not None:
        draw(record, plot)


def make_cases(args: argparse.Namespace) -> list[AttentionCase]:
    """Every dtype, block size and density, with equal and ragged counts, and equal counts with the tail."""
    from diffsparse.kernels.block_sparse import MAX_HEAD_DIM

    for name in ("tokens", "heads", "head_dim", "repeats", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least 1, got {getattr(args, name)}.")
    if args.head_dim > MAX_HEAD_DIM:
        raise ValueError(f"`--head-dim` must be at most {MAX_HEAD_DIM}, got {args.head_dim}.")
    for density in args.densities:
        if not 0 < density <= 1:
            raise ValueError(f"`--densities` must be above 0 and at most 1, got {density}. For 25 % say 0.25.")
    return [
        AttentionCase(
            tokens=args.tokens,
            heads=args.heads,
            head_dim=args.head_dim,
            dtype=dtype,
            query_block_size=query_block_size,
            key_block_size=key_block_size,
            density=density,
            ragged=ragged,
            tail=tail,
        )
        for dtype, (query_block_size, key_block_size), density, (ragged, tail) in itertools.product(
            args.dtypes,
            map(parse_block_sizes, args.blocks),
            args.densities,
            [(False, False), (True, False), (False, True)],
        )
    ]


def parse_block_sizes(blocks: str) -> tuple[int, int]:
    """Query and key block size of a text such as 128x64."""
    query, _, key = blocks.partition("x")
    if not (query.isdecimal() and key.isdecimal() and int(query) and int(key)):
        raise ValueError(f"`--blocks` must be query x key block size in tokens, got {blocks!r}. Say 128x64.")
    return int(query), int(key)


def bench_attention(case: AttentionCase, repeats: int, device: torch.device, backend: str) -> Speed:
    """Time dense attention and the sparse kernel in turn."""
    from torch.nn import functional as F

    from diffsparse.eval.random_attention import random_inputs, random_lists, sparse_call
    from diffsparse.eval.timing import seconds_in_rounds

    blocks = case.query_block_size, case.key_block_size
    query, key, value = random_inputs(case.tokens, case.heads, case.head_dim, device, case.dtype)
    lists, counts = random_lists(case.tokens, case.heads, case.density, device, blocks, raggedness=float(case.ragged))
    sparse = sparse_call(query, key, value, lists, counts, blocks, tail=case.tail, backend=backend)
    dense = functools.partial(F.scaled_dot_product_attention, query, key, value)
    seconds = seconds_in_rounds({"dense": dense, "sparse": sparse}, repeats, device)
    return Speed(
        case=case,
        backend=backend,
        executed_density=float(counts.float().mean()) / -(-case.tokens // case.key_block_size),
        dense_seconds=statistics.median(seconds["dense"]),
        sparse_seconds=statistics.median(seconds["sparse"]),
        speed_up=statistics.median(a / b for a, b in zip(seconds["dense"], seconds["sparse"])),
    )


def print_speeds(speeds: list[Speed], console: Console) -> None:
    """A row for each measured case."""
    from rich.table import Column, Table

    case = speeds[0].case
    title = f"{case.tokens} tokens, {case.heads} heads x {case.head_dim}, against torch's attention"
    taken = {f"{speed.case.dtype} by {speed.backend}" for speed in speeds}
    # In 80 columns there is room for all of it with single padding and headings in two lines.
    whole = [Column(heading, no_wrap=True) for heading in ("dtype", "blocks", "density", "counts", "tail")]
    table = Table(*whole, "dense s", "sparse s", "speed-\nup", "of linear", title=title, collapse_padding=True)
    table.caption = f"Computed: {', '.join(sorted(taken))}"
    for speed in speeds:
        case = speed.case
        table.add_row(
            case.dtype,
            f"{case.query_block_size}x{case.key_block_size}",
            f"{speed.executed_density:.1%}",
            "ragged" if case.ragged else "equal",
            "yes" if case.tail else "no",
            f"{speed.dense_seconds:.3f}",
            f"{speed.sparse_seconds:.3f}",
            f"{speed.speed_up:.2f}x",
            f"{speed.share_of_linear:.0%}",
        )
    console.print(table)

"""`diffsparse stress`: whether kernels stay right while other processes share the device.

A GPU that several processes use interrupts their kernels half-way. Each kernel is called again and again in a process
of its own, so that one that dies or hangs is told from the others.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsparse.eval.output_file import check_output_file, write_json
from diffsparse.eval.stress_load import busy_device
from diffsparse.eval.stress_trial import CALLS, DENSE, RIGHT, SIZES, Outcome, Subject, try_subject

if TYPE_CHECKING:
    import torch
    from rich.console import Console

PRECISIONS = ("native", "int8", "int8_fp8", "fp8")
"""Of 8 bits those that the Hopper kernel has and the benchmark times."""
PROCESSES_ON_GPU, PROCESSES_ELSEWHERE = 20, 2
SECONDS_TO_START = 15
"""About what a process takes until its first call; longer where kernels are still to be compiled."""
COMPLAINTS_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to try, beside how many processes, for how long."""
    parser.description = (
        "Call each kernel again and again while other processes keep the device busy, and say how many calls were "
        "right, and which processes died or hung. PyTorch's dense attention is the control. Takes the seconds of "
        f"--seconds and about {SECONDS_TO_START} more for each size of each kernel: 7 minutes or so on a Hopper GPU, "
        "longer where kernels are not compiled yet. Exit code 1 if one was not right. "
        "The processes inherit the environment: CUDA_LAUNCH_BLOCKING=1 tells which launch failed, "
        "CUDA_ENABLE_COREDUMP_ON_EXCEPTION=1 leaves a core dump for cuda-gdb."
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        metavar="NAME",
        help=f"kernel backends, or {DENSE} for PyTorch's attention (default: {DENSE}, and what is faster than `eager` "
        "here, or else that)",
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        help="what kernels compute in (default: all)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        help=f"that keep the device busy; 0 for none (default: {PROCESSES_ON_GPU} on a GPU, else "
        f"{PROCESSES_ELSEWHERE})",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=SIZES,
        default=list(SIZES),
        help="full: a call as Wan 2.1 14B makes it at 720p, or on a CPU a tiny model; small: many short ones with all "
        f"options, but for {DENSE} (default: both)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="of calls for each kernel in each precision, all sizes together (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=180.0,
        help="seconds after which a process has hung, its start and compilation included (default: %(default)s)",
    )
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument(
        "--output", type=Path, default=Path("diffsparse_stress.json"), help="JSON file to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Try all, print the table, write the JSON file; 1 if anything was not right."""
    import torch
    from rich.console import Console

    from diffsparse.eval.generate import choose_device

    console = Console()
    check_output_file("`--output`", args.output)
    device = torch.device(choose_device(args.device))
    if args.processes is None:
        args.processes = PROCESSES_ON_GPU if device.type == "cuda" else PROCESSES_ELSEWHERE
    _check(args)
    # Reasons are others' words, and no markup.
    subjects = subjects_of(args, device, lambda line: console.print(line, markup=False))
    seconds = args.seconds / len(args.sizes)
    minutes = len(subjects) * (seconds + SECONDS_TO_START) / 60
    console.print(
        f"{len(subjects)} processes one after the other, beside {args.processes} that keep {device} busy: some "
        f"{max(1, math.ceil(minutes))} min, {math.ceil(len(subjects) * args.limit / 60)} at most"
    )
    outcomes = stress(subjects, args, device, console)
    show(outcomes, args.processes, console)
    console.print(f"Written to {args.output}")
    return int(any(outcome.verdict != RIGHT for outcome in outcomes))


def subjects_of(args: argparse.Namespace, device: torch.device, say: Callable[[str], None]) -> list[Subject]:
    """Each backend in each precision at each size, as far as it can run here; `say` is told of what cannot.

    Raises:
        ValueError: a backend that was named cannot run here, or nothing is left to try.
    """
    from diffsparse.kernels.backends import BACKENDS, available_backends, left_to

    reasons = {precision: available_backends(device, precision) for precision in ("native", *args.precisions)}
    for name in args.backends or ():
        if name not in (DENSE, *BACKENDS):
            raise ValueError(
                f"`--backends` must be among {', '.join((DENSE, *BACKENDS))}, got {name!r}. Leave it out for those "
                f"that count here."
            )
        if reason := reasons["native"].get(name):
            raise ValueError(f"`--backends` {name} cannot run on {device}: {reason}. Leave it out.")
    fast = list(BACKENDS)[: list(BACKENDS).index("eager")]
    default = [DENSE, *([name for name in fast if reasons["native"][name] is None] or ["eager"])]
    subjects = []
    for name in args.backends or default:
        if name == DENSE:
            subjects += [Subject(DENSE, "native", size, str(device)) for size in args.sizes if size == "full"]
            continue
        for precision in args.precisions:
            if reason := reasons[precision][name]:
                say(f"{name} {precision} cannot run: {reason}")
                continue
            if other := left_to(name, precision):
                say(f"{name} {precision} goes to {other}")
                continue
            subjects += [Subject(name, precision, size, str(device)) for size in args.sizes]
    if not subjects:
        raise ValueError("Nothing is left to try of `--backends`, `--precisions`, `--sizes`. Leave them out for all.")
    return subjects


def stress(
    subjects: Sequence[Subject], args: argparse.Namespace, device: torch.device, console: Console, calls: str = CALLS
) -> list[Outcome]:
    """Try all subjects on the busy device; after each, `args.output` holds those that are done."""
    from diffsparse.eval.environment import describe_machine

    record: dict[str, Any] = {
        "machine": describe_machine(device),
        "device": str(device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str, list))},
        # They change how a GPU's failures show.
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("CUDA_")},
        "left": len(subjects),
        "outcomes": [],
    }
    outcomes = []
    with busy_device(str(device), args.processes) as count_running:
        for subject in subjects:
            outcome = try_subject(subject, args.seconds / len(args.sizes), args.limit, calls)
            outcomes.append(outcome)
            running = count_running()
            record["outcomes"].append(asdict(outcome) | {"busy_processes": running})
            record["left"] -= 1
            write_json(args.output, record)
            console.print(f"{subject.name}: {outcome.verdict}, {outcome.right} right", markup=False)
            if running < args.processes:
                console.print(f"Only {running} of the {args.processes} processes beside it still run.")
    return outcomes


def show(outcomes: Sequence[Outcome], processes: int, console: Console) -> None:
    """A row for each, and below the table the last words of those that were not right."""
    from rich.markup import escape
    from rich.table import Table

    title = f"Calls beside {processes} processes"
    table = Table("attention", "precision", "size", "", "right", "wrong", "error", "how it ended", title=title)
    for outcome in outcomes:
        subject = outcome.subject
        # What is not a number is the worst.
        error = max((math.inf if error is None else error for error in outcome.errors.values()), default=None)
        table.add_row(
            subject.backend,
            subject.precision,
            subject.size,
            f"[{'green' if outcome.verdict == RIGHT else 'bold red'}]{outcome.verdict}[/]",
            str(outcome.right),
            f"{outcome.wrong}, by up to {outcome.differing:,} numbers" if outcome.differing else str(outcome.wrong),
            "" if error is None else "nan" if error == math.inf else f"{error:.1e}",
            escape(outcome.ended),
        )
    console.print(table)
    for outcome in outcomes:
        if outcome.complaints:
            console.print(f"{outcome.subject.name}, its last words:", markup=False)
            console.print("\n".join(outcome.complaints[-COMPLAINTS_SHOWN:]), markup=False, highlight=False)
    if any(outcome.subject.backend == DENSE and outcome.verdict != RIGHT for outcome in outcomes):
        console.print(
            "PyTorch's own attention was not right either: that says more about this machine than of kernels."
        )


def _check(args: argparse.Namespace) -> None:
    if not hasattr(os, "waitid"):
        raise ValueError("`diffsparse stress` needs `os.waitid`: Linux, or macOS with Python 3.13.")
    if args.processes < 0:
        raise ValueError(f"`--processes` must be at least 0, got {args.processes}.")
    if not 0 < args.seconds < math.inf:
        raise ValueError(f"`--seconds` must be above 0, got {args.seconds}.")
    if not args.seconds < args.limit < math.inf:
        raise ValueError(
            f"`--limit` must be more than `--seconds` {args.seconds:g}, got {args.limit:g}. A process also has to "
            f"start and to compile: say {args.seconds + 160:g}."
        )

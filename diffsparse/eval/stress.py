"""`diffsparse stress`: whether kernels stay right while other processes share the device.

A GPU that several processes use interrupts their kernels half-way. Each kernel is called again and again in a process
of its own, so that one that dies or hangs is told from the others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsparse.eval.bench_suite import BLOCK_SIZE, LARGEST_ERRORS
from diffsparse.eval.output_file import check_output_file
from diffsparse.eval.stress_calls import CALLS, DENSE, SIZES, Subject, small_cases, why_not_full
from diffsparse.eval.stress_load import busy_device
from diffsparse.eval.stress_trial import DIED, HUNG, NO_MEMORY, RIGHT, Outcome, try_subject
from diffsparse.whole_file import whole_file

if TYPE_CHECKING:
    import torch
    from rich.console import Console

# Processes, tokens and heads: a GPU's, and what a processor computes in a moment.
ON_GPU = {"processes": 20, "tokens": 75_600, "heads": 40}
ELSEWHERE = {"processes": 2, "tokens": 1024, "heads": 2}
SECONDS_TO_START = 15
"""About what a process takes until its first call; longer where kernels are still to be compiled."""
COMPLAINTS_SHOWN = 5
SHOWN_VERDICTS = {
    RIGHT: "[green]right[/]",
    **{verdict: f"[bold red]{verdict}[/]" for verdict in ("wrong", DIED, HUNG)},
    NO_MEMORY: "[yellow]no memory[/]",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to try, beside how many processes, for how long."""
    parser.description = (
        "Call each kernel again and again while other processes keep the device busy, and say how many calls were "
        "right, and which processes died or hung. PyTorch's dense attention is the control. Takes the seconds of "
        f"--seconds and about {SECONDS_TO_START} more for each size of each kernel: 4 minutes or so on a Hopper GPU, "
        "longer where kernels are not compiled yet. Exit code 1 if a kernel that is not switched off was not right. "
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
        choices=tuple(LARGEST_ERRORS),
        default=list(LARGEST_ERRORS),
        help="what kernels compute in (default: %(default)s)",
    )
    parser.add_argument(
        "--switched-off",
        action="store_true",
        help="also try what is switched off because it was found wanting: the Hopper kernel in 8 bits",
    )
    parser.add_argument(
        "--processes",
        type=int,
        help=f"that keep the device busy; 0 for none (default: {ON_GPU['processes']} on a GPU, else "
        f"{ELSEWHERE['processes']})",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=SIZES,
        default=list(SIZES),
        help="full: one call as a model makes it; small: many short ones with all options (default: %(default)s)",
    )
    for name, what in (("tokens", "tokens of the full size"), ("heads", "attention heads of the full size")):
        parser.add_argument(
            f"--{name}", type=int, help=f"{what} (default: {ON_GPU[name]} on a GPU, else {ELSEWHERE[name]})"
        )
    parser.add_argument("--head-dim", type=int, default=128, help="of the full size (default: %(default)s)")
    parser.add_argument(
        "--density", type=float, default=0.25, help="share of key blocks at the full size (default: %(default)s)"
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
    """Try all, print the table, write the JSON file; 1 if anything that is not switched off was not right."""
    import torch
    from rich.console import Console

    from diffsparse.eval.generate import choose_device

    console = Console()
    check_output_file("`--output`", args.output)
    device = torch.device(choose_device(args.device))
    for name, value in (ON_GPU if device.type == "cuda" else ELSEWHERE).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    _check(args)
    args.sizes = list(dict.fromkeys(args.sizes))
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
    return int(any(outcome.condemns for outcome in outcomes))


def subjects_of(args: argparse.Namespace, device: torch.device, say: Callable[[str], None]) -> list[Subject]:
    """Each backend in each precision at each size, as far as it can run here; `say` is told of what cannot.

    Raises:
        ValueError: a backend that was named cannot run here, or there is nothing for `--switched-off` to add.
    """
    from diffsparse.kernels.backends import BACKENDS, available_backends, left_to

    unknown = [name for name in args.backends or () if name not in (DENSE, *BACKENDS)]
    if unknown:
        raise ValueError(
            f"`--backends` must be among {', '.join((DENSE, *BACKENDS))}, got {unknown[0]!r}. Leave it out for those "
            f"that count here."
        )
    reasons = available_backends(device)
    for name in args.backends or ():
        if reasons.get(name) is not None:
            raise ValueError(f"`--backends` {name} cannot run on {device}: {reasons[name]}. Leave it out.")
    names = args.backends
    if names is None:
        fast = list(BACKENDS)[: list(BACKENDS).index("eager")]
        names = [DENSE, *([name for name in fast if reasons[name] is None] or ["eager"])]
    subjects = []
    for name in dict.fromkeys(names):
        for precision in ("native",) if name == DENSE else dict.fromkeys(args.precisions):
            other = None if name == DENSE else left_to(name, precision, BLOCK_SIZE)
            is_off = other is not None
            if is_off and not args.switched_off:
                say(f"{name} {precision} is switched off and goes to {other}. Add it with --switched-off.")
                continue
            for size in args.sizes:
                if reason := _why_not(name, precision, size, args.head_dim, device):
                    say(f"{name} {precision}, {size}, cannot run: {reason}")
                    continue
                sizes = args.tokens, args.heads, args.head_dim, args.density
                subjects.append(Subject(name, precision, size, is_off, str(device), *sizes))
    if args.switched_off and not any(subject.switched_off for subject in subjects):
        raise ValueError(
            f"`--switched-off` adds nothing on {device}: what is switched off is the backend gluon in 8 bits, "
            f"{reasons['gluon'] or 'and it is not asked for'}. Leave it out."
        )
    if not subjects:
        raise ValueError("Nothing is left to try of `--backends` and `--precisions`. Leave them out for all.")
    return subjects


def stress(
    subjects: Sequence[Subject], args: argparse.Namespace, device: torch.device, console: Console, calls: str = CALLS
) -> list[Outcome]:
    """Try all subjects on the busy device; after each, `args.output` holds those that are done."""
    from diffsparse.eval.bench_machine import describe_machine

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
            with whole_file(args.output) as unfinished:
                unfinished.write_text(json.dumps(record, indent=1) + "\n")
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
        errors = [float(error) for error in outcome.errors.values()]
        table.add_row(
            subject.backend,
            subject.precision + (", switched off" if subject.switched_off else ""),
            subject.size,
            SHOWN_VERDICTS[outcome.verdict],
            str(outcome.right),
            f"{outcome.wrong}, by up to {outcome.differing:,} numbers" if outcome.differing else str(outcome.wrong),
            # Unlike max(), a sum keeps what is not a number.
            f"{max(errors) if math.isfinite(sum(errors)) else sum(errors):.1e}" if errors else "",
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
    from diffsparse.kernels.block_sparse import MAX_HEAD_DIM

    if not hasattr(os, "killpg"):
        raise ValueError("`diffsparse stress` ends processes as Linux and macOS do, and this is neither.")
    for name, least in (("processes", 0), ("tokens", 1), ("heads", 1), ("head_dim", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least {least}, got {getattr(args, name)}.")
    if args.head_dim > MAX_HEAD_DIM:
        raise ValueError(f"`--head-dim` must be at most {MAX_HEAD_DIM}, got {args.head_dim}.")
    if not 0 < args.density <= 1:
        raise ValueError(f"`--density` must be above 0 and at most 1, got {args.density}. For 25 % say 0.25.")
    if not 0 < args.seconds < math.inf:
        raise ValueError(f"`--seconds` must be above 0, got {args.seconds}.")
    if not args.seconds < args.limit < math.inf:
        raise ValueError(
            f"`--limit` must be more than `--seconds` {args.seconds:g}, got {args.limit:g}. A process also has to "
            f"start and to compile: say {args.seconds + 160:g}."
        )


def _why_not(backend: str, precision: str, size: str, head_dim: int, device: torch.device) -> str | None:
    if backend == DENSE:
        return None
    if size == "full":
        return why_not_full(backend, precision, head_dim, device)
    return None if small_cases(backend, precision, device) else "it takes none of the small calls"

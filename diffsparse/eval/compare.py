"""`diffsparse eval compare A B`: how close two videos are, frame by frame; or which of two runs is closer to dense."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffsparse.eval.compare_runs import compare_runs, rows_of_runs
from diffsparse.eval.comparison import compare, windows_of
from diffsparse.eval.lpips_metric import Lpips, NoLpips, add_lpips_arguments, lpips_or_reason
from diffsparse.eval.output_file import check_output_file, write_json
from diffsparse.eval.run_folder import MANIFEST


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two videos or runs, and where to look for LPIPS' backbone."""
    parser.add_argument("a", type=Path, metavar="A", help="video file, folder with one image a frame, or run's folder")
    parser.add_argument("b", type=Path, metavar="B", help="the other one, of the same size and length; or another run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all scores to FILE")
    add_lpips_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table, write the JSON."""
    check_output_file("--json", args.json)
    lpips = lpips_or_reason(args.lpips_net, args.lpips_backbone)
    are_runs = [(path / MANIFEST).is_file() for path in (args.a, args.b)]
    if any(are_runs) and not all(are_runs):
        of_run, other = (args.a, args.b) if are_runs[0] else (args.b, args.a)
        raise ValueError(f"{of_run} is a run, {other} is not: name two runs, or the frames of a video in {of_run}.")
    of_both = (_of_runs if all(are_runs) else _of_videos)(args.a, args.b, lpips)
    if args.json is not None:
        write_json(args.json, {"a": str(args.a), "b": str(args.b)} | of_both)
    return 0


def _of_videos(a: Path, b: Path, lpips: Lpips | NoLpips) -> dict[str, Any]:
    scored = compare(windows_of(a, b), lpips)
    title = f"{scored.num_frames} frames of {scored.width} × {scored.height}"
    _print(title, ("", "mean", "worst frame"), scored.rows())
    _print_notes(scored.notes())
    return scored.as_dict()


def _of_runs(a: Path, b: Path, lpips: Lpips | NoLpips) -> dict[str, Any]:
    differences = compare_runs(a, b, lpips)
    notes = [f"A is {a}, B is {b}: each one's sparse videos against its own dense ones, on the same prompts and seeds."]
    if isinstance(lpips, NoLpips) and all(row["metric"] != "lpips" for row in differences):
        notes.append(f"LPIPS {lpips.reason}.")
    headings, rows = rows_of_runs(differences, lpips.net)
    for config in dict.fromkeys(row[0] for row in rows):
        # A terminal is too narrow for one more column.
        _print(f"{config}: B against A", headings[1:], [row[1:] for row in rows if row[0] == config])
    _print_notes([*notes, "Under B − A: the 95 % interval of its mean, by bootstrap. p: of the sign test."])
    return {"lpips_net": lpips.net, "differences": differences}


def _print(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title))
    for heading in headings:
        table.add_column(escape(heading), overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(highlight=False).print(table)


def _print_notes(notes: Sequence[str]) -> None:
    from rich.console import Console

    for note in notes:
        # Long addresses stay in one piece, to be copied.
        Console().print(note, markup=False, highlight=False, soft_wrap=True)

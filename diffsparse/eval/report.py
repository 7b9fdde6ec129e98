"""`diffsparse eval report RUN…`: what a run found, as one HTML page, as Markdown and as JSON."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from diffsparse.eval.head_picture import draw_head_classes
from diffsparse.eval.lpips_metric import add_lpips_arguments, lpips_or_reason
from diffsparse.eval.output_file import make_writable, write_json
from diffsparse.eval.report_clips import make_clips
from diffsparse.eval.report_data import collect
from diffsparse.eval.report_markdown import as_markdown
from diffsparse.eval.report_page import as_page
from diffsparse.eval.report_tables import filled, headline, label, notes, published
from diffsparse.report import SparseAttentionReport, TransformerReport
from diffsparse.whole_file import whole_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs, where the report goes, how large it may be."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder that `diffsparse eval run` wrote")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where report.html, .md and .json go (default: the first RUN)"
    )
    parser.add_argument(
        "--max-megabytes", type=float, default=20.0, metavar="MB", help="of videos in the page (default: 20)"
    )
    add_lpips_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Score what is not scored yet, write the three files, print the headline; 1 if videos are missing."""
    if not args.max_megabytes >= 0:
        raise ValueError(f"--max-megabytes must be at least 0, got {args.max_megabytes}.")
    output = args.output or args.runs[0]
    data = collect(args.runs, lpips_or_reason(args.lpips_net, args.lpips_backbone))
    make_writable(output)
    clips, left_out = make_clips(data, args.max_megabytes * 1e6)
    page = as_page(data, clips, left_out, _head_pictures(data))
    write_json(output / "report.json", data)
    for name, contents in (("report.html", page), ("report.md", as_markdown(data))):
        with whole_file(output / name) as unfinished:
            # A folder's name may have bytes that are no UTF-8.
            unfinished.write_text(contents, "utf-8", "backslashreplace")
    _print(data, output)
    return 1 if data["missing"] else 0


def _head_pictures(data: dict[str, Any]) -> dict[str, bytes]:
    """A picture for each config, of its first video in which sparse attention ran, by what stands under it."""
    pictures = {}
    for config in data["configs"]:
        for video in data["videos"]:
            is_its = (video["run"], video["config"]) == (config["run"], config["name"])
            if is_its and video["density"] is not None:
                named = label(data, config["run"], config["name"])
                caption = f"{named}: “{video['prompt']}”, seed {video['seed']}, as last planned"
                pictures[caption] = _picture(video["attention"])
                break
    return pictures


def _picture(attention: dict[str, Any]) -> bytes:
    names = set(TransformerReport.__dataclass_fields__)
    reports = [
        TransformerReport(**{name: value for name, value in transformer.items() if name in names})
        for transformer in attention["transformers"]
    ]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "heads.png"
        draw_head_classes(SparseAttentionReport(tuple(reports)), file)
        return file.read_bytes()


def _print(data: dict[str, Any], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    headings, rows = headline(data)
    console = Console(highlight=False)
    # Configs side by side: a terminal is narrower than the metrics are many.
    table = Table(title="Sparse against dense: mean [95 % interval], worst frame", title_justify="left")
    table.add_column("")
    for row in rows:
        # As Text: in what comes from outside, brackets are no markup.
        table.add_column(Text(row[0]), overflow="fold")
    for index, heading in enumerate(headings[1:], start=1):
        table.add_row(heading, *(Text(row[index]) for row in rows))
    console.print(table)
    if data["published"]:
        headings, rows = filled(headings, published(data, mark=""))
        table = Table(*headings, title="Published, not measured here", title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for note in notes(data):
        console.print(note, markup=False, soft_wrap=True)
    console.print(
        f"Open {output / 'report.html'}; report.md and report.json lie beside it.", markup=False, soft_wrap=True
    )

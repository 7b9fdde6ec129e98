"""`diffsparse eval strategies`: every strategy on the demo model, at equal measured density, with and without tail.

First each strategy's own option is set so that it runs at each density, on one dense video (`dials.py`). Then the
videos are made, and compared with the dense one of the same prompt and seed by PSNR and SSIM.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffsparse.eval import sweep
from diffsparse.eval.dials import SETTING, Dials, Row
from diffsparse.eval.generate import Sampling
from diffsparse.eval.json_shape import check_shape
from diffsparse.eval.output_file import check_output_file, reading
from diffsparse.eval.recorded_calls import record_calls
from diffsparse.eval.strategies_plot import draw
from diffsparse.eval.strategies_table import as_markdown
from diffsparse.eval.strategy_rows import ROWS
from diffsparse.eval.sweep_results import SweepResults, Variant
from diffsparse.eval.with_tail import with_tail
from diffsparse.strategies.strategy import Strategy

DIALS = Path("strategies-dials.json")
TAILS = {"both": (False, True), "with": (True,), "without": (False,)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which strategies, how much of it, which part of the work, and where the results go."""
    sweep.add_arguments(parser, prompts=15, densities=[0.1, 0.2, 0.3])
    parser.add_argument(
        "--strategies",
        nargs="+",
        default=[row.name for row in ROWS],
        choices=[row.name for row in ROWS],
        metavar="NAME",
        help=f"rows of the table (default: all: {', '.join(row.name for row in ROWS)})",
    )
    parser.add_argument(
        "--tail",
        choices=list(TAILS),
        default="both",
        help="whether what is skipped enters as its mean (default: both, each in rows of its own)",
    )
    parser.add_argument(
        "--dials",
        type=Path,
        default=DIALS,
        metavar="FILE",
        help=f"the option of each strategy at each density; what it has not is found first (default: {DIALS})",
    )
    parser.add_argument("--find-dials", action="store_true", help="only find what --dials has not yet")
    parser.add_argument(
        "--seconds",
        action="store_true",
        help="also show the time of the steps, which says something only where processes did not share the device",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw PSNR against density as a PNG")


def run(args: argparse.Namespace) -> int:
    """Find dials, make videos, print the table; or join files into one table."""
    check_output_file("--plot", args.plot)
    if args.find_dials:
        sampling, _, load = sweep.prepared(args)
        _dials(args, sampling, load)
        return 0
    results = sweep.carry_out(args, "strategies", functools.partial(_prepare, args))
    if results is not None:
        if "dials" not in results.settings:
            raise ValueError("--merge: these are results of another command, not of `diffsparse eval strategies`.")
        if args.merge:
            with reading(f"{', '.join(map(str, args.merge))}: no table can be made of it", "Name another file."):
                _check_dials(results)
        print(as_markdown(results, args.seconds))
        if args.plot is not None:
            draw(results, args.plot)
    return 0


def _prepare(
    args: argparse.Namespace, sampling: Sampling, load: Callable[[], Any]
) -> tuple[Mapping[Variant, Strategy], dict[str, Any]]:
    """The strategies of all variants, and the dials, on which the results depend."""
    dials = _dials(args, sampling, load)
    strategies = {
        Variant(row.name, density, tail): with_tail(row.at(dials.setting(row.name, density).position), tail)
        for row in _rows(args)
        for tail in TAILS[args.tail]
        for density in args.densities
    }
    return strategies, {"dials": dials.settings}


def _dials(args: argparse.Namespace, sampling: Sampling, load: Callable[[], Any]) -> Dials:
    """The dials of the chosen rows and densities, found where the file has not got them.

    Raises:
        ValueError: the file lacks some, and this is a shard, all of which would find them.
    """
    pair = sweep.pairs_of(args)[0]
    conditions = {"sampling": str(sampling), "dense_steps": args.dense_steps, "prompt": pair.prompt, "seed": pair.seed}
    dials = Dials(args.dials, conditions)
    missing = {row: [d for d in args.densities if not dials.has(row.name, d)] for row in _rows(args)}
    missing = {row: densities for row, densities in missing.items() if densities}
    if missing and args.shard is not None:
        raise ValueError(
            f"{args.dials} has no dials of {', '.join(row.name for row in missing)}. "
            f"Find them before the shards: the same command with --find-dials and without --shard."
        )
    if missing:
        check_output_file("--dials", args.dials)
    calls = record_calls(load(), pair.prompt, pair.seed, sampling, args.dense_steps) if missing else []
    for row, densities in missing.items():
        dials.find(row, densities, calls)
        for density in densities:
            setting = dials.setting(row.name, density)
            found = f"{setting.option}={setting.value} runs {100 * setting.density:.1f} %"
            print(f"{row.name} at {100 * density:g} %: {found}", flush=True)
    return dials


def _check_dials(results: SweepResults) -> None:
    """Raise TypeError unless each variant has its dial."""
    of_variants: dict[str, dict[str, Any]] = {}
    for variant in results.variants:
        of_variants.setdefault(variant.row, {})[str(variant.density)] = SETTING
    check_shape(results.settings["dials"], of_variants, "dials")


def _rows(args: argparse.Namespace) -> list[Row]:
    return [row for row in ROWS if row.name in args.strategies]

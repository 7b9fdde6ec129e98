"""The command `diffsparse`: a table of its commands, and what the user sees when one fails."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from diffsparse.eval import ablation, bench, compare, demo, doctor, report, run

# Each module has add_arguments(parser) and run(args) -> exit code, and imports what is heavy only in run.
COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "demo": (demo, "make one video densely and sparsely with the embedded model, and compare the two"),
    "bench": (bench, "time sparse attention against dense attention on this machine"),
    "doctor": (doctor, "what this machine can run, and a self-test of it"),
}
EVAL_COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "run": (run, "videos of the same prompts and seeds, densely and by each config, in a folder"),
    "report": (report, "a page with the scores, times and videos of runs"),
    "compare": (compare, "PSNR, SSIM, MS-SSIM, LPIPS and flicker of two videos"),
    "ablation": (ablation, "what the adaptive strategy owes to its parts, on the demo model"),
}

USER_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv (default: of the process) and return its exit code.

    0 is success, 2 something that the user can mend, told in one line, 130 Ctrl-C.
    """
    args = make_parser().parse_args(argv)
    try:
        exit_code: int = args.run(args)
    except KeyboardInterrupt:
        print("diffsparse: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        print(f"diffsparse: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    return exit_code


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; the parsed `run` is the chosen one's."""
    parser = argparse.ArgumentParser(
        prog="diffsparse",
        description="Sparse attention for diffusion transformers: try it, measure it, look whether it is worth it.",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add(commands, COMMANDS)
    evaluation = commands.add_parser("eval", help="quality of videos", description="Quality of videos.")
    _add(evaluation.add_subparsers(required=True, metavar="COMMAND"), EVAL_COMMANDS)
    return parser


def _add(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], commands: dict[str, tuple[ModuleType, str]]
) -> None:
    for name, (module, summary) in commands.items():
        parser = subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        module.add_arguments(parser)
        parser.set_defaults(run=module.run)

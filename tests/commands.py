"""Commands of `diffsparse` without what `main` makes of their errors."""

from __future__ import annotations

import argparse

from diffsparse.eval.cli import make_parser


def parsed(*words: object) -> argparse.Namespace:
    """The arguments of a command line."""
    texts = [str(word) for word in words]
    return make_parser(texts).parse_args(texts)


def run_command(*words: object) -> int:
    """Run a command line, and give its exit code."""
    args = parsed(*words)
    exit_code: int = args.run(args)
    return exit_code

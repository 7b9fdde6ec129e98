"""The command `diffsparse`: a table of its commands, and what the user sees when one fails."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence

# Each names a module with add_arguments(parser) and run(args) -> exit code, which imports what is heavy only in run.
COMMANDS = {
    "demo": "make one video densely and sparsely with the embedded model, and compare the two",
    "inspect": "what each attention head keeps, step by step, as a page with attention maps",
    "calibrate": "what a strategy plans on a few prompts, as a file that any run can use",
    "bench": "time sparse attention against dense attention on this machine",
    "stress": "whether the kernels stay right while other processes share the device",
    "plan": "what sparse attention is expected to save, without weights or GPU",
    "kernels": "what the Triton kernel takes on every architecture, compiled without a GPU",
    "families": "every transformer of diffusers, its family, or why it stays dense",
    "doctor": "what this machine can run, and a self-test of it",
    "comfyui-install": "show the nodes to a ComfyUI: a small folder in its custom_nodes",
    "comfyui-uninstall": "take that folder away again, and nothing else",
}
EVAL_COMMANDS = {
    "run": "videos of the same prompts and seeds, densely and by each config, in a folder",
    "report": "a page with the scores, times and videos of runs",
    "compare": "PSNR, SSIM, MS-SSIM, LPIPS and flicker of two videos, or the scores of two runs",
    "fetch-lpips": "download the network that LPIPS judges by, and check it",
    "strategies": "every strategy at equal measured density, on the demo model",
    "ablation": "what the adaptive strategy owes to its parts, on the demo model",
}

# An inspect.py would hide Python's own from scripts that are started in this folder.
MODULES = {"inspect": "inspect_command"}

USER_ERROR = 2
BY_SIGNAL = 128
STOPPED_READING = 1

# Of `kill`, `timeout` or a job's time that is up, and of a terminal that closes. Windows has only the first.
ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv (default: of the process) and return its exit code.

    0 is success, 2 something that the user can mend, told in one line, 130 Ctrl-C, 143 SIGTERM, 1 also an output
    that nobody reads to its end.
    """
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Not every terminal or pipe has "×": a question mark is better than an error after all the work.
        sys.stdout.reconfigure(errors="replace")
    try:
        # Here too: the modules of a command take seconds to load.
        with _ending_as_by_ctrl_c():
            return _run_command(make_parser(argv).parse_args(argv))
    except KeyboardInterrupt as interrupt:
        print("diffsparse: interrupted", file=sys.stderr)
        return BY_SIGNAL + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def make_parser(words: Collection[str] | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; the parsed `run` is the chosen one's.

    With `words` of a command line, only a command among them has its arguments: the others' modules need not load.
    """
    parser = argparse.ArgumentParser(
        prog="diffsparse",
        description="Sparse attention for diffusion transformers: try it, measure it, look whether it is worth it.",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add(commands, COMMANDS, words)
    evaluation = commands.add_parser("eval", help="quality of videos", description="Quality of videos.")
    _add(evaluation.add_subparsers(required=True, metavar="COMMAND"), EVAL_COMMANDS, words)
    return parser


@contextlib.contextmanager
def _ending_as_by_ctrl_c() -> Iterator[None]:
    """Let each of `ENDINGS` end the block as Ctrl-C does, so that what is written by half goes away.

    What is ignored, as under `nohup`, stays so. Only the main thread may ask for this.
    """
    is_main = threading.current_thread() is threading.main_thread()
    taken = [number for number in ENDINGS if is_main and signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def _run_command(args: argparse.Namespace) -> int:
    try:
        exit_code: int = args.run(args)
        # There is none where the shell has closed it.
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads the output has read enough, as `head` does. Python would complain of the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return STOPPED_READING
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        return _tell(str(error))
    except (MemoryError, RuntimeError) as error:
        if args.traceback or not _is_out_of_memory(error):
            raise
        return _tell(f"out of memory: ask for something smaller, or let other processes end first. {error}")
    return exit_code


def _tell(error: str) -> int:
    print(f"diffsparse: error: {' '.join(error.split())}", file=sys.stderr)
    return USER_ERROR


def _is_out_of_memory(error: Exception) -> bool:
    # Of most GPUs torch has an error of its own, which is not loaded for this; of Apple's and of the CPU it has none.
    of_gpu = type(error).__name__ == "OutOfMemoryError" or "MPS backend out of memory" in str(error)
    # The last is the CPU's in Windows.
    of_cpu = any(words in str(error) for words in ("can't allocate memory", "not enough memory"))
    return of_gpu or of_cpu or isinstance(error, MemoryError)


def _add(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    commands: Mapping[str, str],
    words: Collection[str] | None,
) -> None:
    for name, summary in commands.items():
        parser = subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if words is None or name in words:
            module = importlib.import_module(f"diffsparse.eval.{MODULES.get(name, name.replace('-', '_'))}")
            module.add_arguments(parser)
            parser.set_defaults(run=module.run)

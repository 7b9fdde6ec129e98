"""Files that a command writes, looked at before it works for them, and reads again."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffsparse.whole_file import whole_file


def check_output_file(option: str, file: Path | None) -> None:
    """Raise ValueError where a file is asked for by `option` of the command line, and cannot be written."""
    if file is None:
        return
    # Where a link leads to, as `whole_file` writes it.
    target = Path(os.path.realpath(file))
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"{option} must name a file in a folder that exists, got {file}.")
    if file.exists() and not file.is_file():
        # A file that is written whole takes the place of what was there. Asked of the link, since where /dev/stdout
        # leads to in a pipe has no name.
        raise ValueError(f"{option} must name a file, and {file} is a device or a pipe. Name a file, then read it.")
    # A new file is written beside an old one, so that the folder has to allow it too.
    if not os.access(target.parent, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise ValueError(f"{option} {file} cannot be written: no permission. Name another file.")


def make_writable(folder: Path) -> None:
    """Make the folder, and find out now whether a file can be written there."""
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"Nothing can be written to --output {folder}: {error.strerror}. Name another folder."
        ) from error


@contextlib.contextmanager
def reading(failure: str, way_out: str) -> Iterator[None]:
    """A file that the block cannot read, or that lacks what it looks for: ValueError of failure, reason, way out."""
    try:
        yield
    # The last two are of a 0 to divide by or a number too large, and of brackets in more brackets than Python follows.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{failure} ({type(error).__name__}: {error}). {way_out}") from error


def write_json(file: Path, contents: dict[str, Any], default: Callable[[Any], str] | None = None) -> None:
    """Write a file whole or not at all; `default` names what JSON has no word for, but for numbers that are none."""
    text = json.dumps(contents, indent=1, ensure_ascii=False, allow_nan=False, default=default)
    with whole_file(file) as unfinished:
        # Bytes of a file's name that are no UTF-8 become JSON's own \u.
        unfinished.write_text(text + "\n", "utf-8", "backslashreplace")

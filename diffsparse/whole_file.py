"""Writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to; the file takes its real name when all is written, and vanishes if that fails.

    Where the name is a link, the file that it leads to is written, and the link stays.
    """
    path = Path(os.path.realpath(path))
    unfinished = unfinished_name(path)
    try:
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        # A full disk does not say of which file. One without a number would lose its own words to the name.
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def unfinished_name(path: Path) -> Path:
    """The name that a file or folder has until all of it is written."""
    # Hidden, beside the real one (os.replace cannot cross disks), and of the same suffix: writers look at it.
    # No longer than the real one, where that is as long as a name may be.
    return path.with_name(f".{path.stem[:50]}.{os.getpid()}.unfinished{path.suffix}")

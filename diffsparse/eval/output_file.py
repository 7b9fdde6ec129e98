"""A file that a command shall write, looked at before it works for it."""

from __future__ import annotations

import os
from pathlib import Path


def check_output_file(option: str, file: Path) -> None:
    """Raise ValueError unless a file of this name can be written; `option` is what names it on the command line."""
    folder = file.absolute().parent
    if file.is_dir() or not folder.is_dir():
        raise ValueError(f"{option} must name a file in a folder that exists, got {file}.")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise ValueError(f"{option} {file} cannot be written: no permission. Name another file.")

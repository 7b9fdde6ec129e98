"""The folder of plan files among ComfyUI's models, and which of them a node may read and write."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

from diffsparse.config import PLAN_FILE_SUFFIX
from diffsparse.whole_file import unfinished_name

FOLDER = "diffsparse"
NO_FILE = "none"

_NAME = re.compile(r"\w[\w .+-]*")
_DEVICE_OF_WINDOWS = re.compile(r"(con|prn|aux|nul|(com|lpt)[1-9¹²³]) *(\..*)?", re.IGNORECASE)


def plan_names() -> tuple[str, ...]:
    """What `plan_file` may be: none, and the plan files in ComfyUI's folders, in subfolders too."""
    folders = _folders()
    names = () if folders is None else folders.get_filename_list(FOLDER)
    # A hidden one is not written to its end.
    return (NO_FILE, *(name for name in names if not Path(name).name.startswith(".")))


def find_plans(name: str) -> Path:
    """The file of a name in `plan_names`.

    Raises:
        ValueError: ComfyUI's folders have no such file. What lies outside of them is never read.
    """
    folders = _folders()
    if folders is None or name not in plan_names()[1:]:
        where = f"ComfyUI's models/{FOLDER}" if folders is None else " or ".join(folders.get_folder_paths(FOLDER))
        raise ValueError(
            f"DiffSparse: plan_file {name!r} is no plan file in {where}. Put the file there and press R, so that the "
            f"list has it, or choose {NO_FILE}."
        )
    return Path(folders.get_full_path(FOLDER, name))


def new_plans(name: str) -> Path:
    """Where a file that the user calls `name` is to be written, in the first of ComfyUI's folders, which is made.

    Raises:
        ValueError: the name is not one of a file alone, or no file of that name can be written there.
    """
    check_new_name(name)
    folders = _folders()
    if folders is None:
        raise ValueError("DiffSparse Calibrate writes into ComfyUI's models folder, and no ComfyUI runs here.")
    path = Path(folders.get_folder_paths(FOLDER)[0]) / (name.strip().removesuffix(PLAN_FILE_SUFFIX) + PLAN_FILE_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name that is too long is found here, and below whether the folder can be written.
        with contextlib.suppress(FileNotFoundError):
            path.lstat()
        probe = unfinished_name(path)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"DiffSparse Calibrate cannot write {path}: {error.strerror}.") from error
    return path


def check_new_name(name: str) -> None:
    """Raise ValueError unless `name` is that of a file alone, wherever ComfyUI runs."""
    if _NAME.fullmatch(name.strip()) is None or name.strip().endswith("."):
        raise ValueError(
            f"DiffSparse: file_name {name!r} is no name of a file. Use letters, digits, spaces and . _ + -, such as "
            f"wan_720p; the folder is ComfyUI's models/{FOLDER}."
        )
    if _DEVICE_OF_WINDOWS.fullmatch(name.strip()) is not None:
        raise ValueError(
            f"DiffSparse: file_name {name!r} is a device in Windows and no name of a file there. Use another, such as "
            f"{name.strip().partition('.')[0].strip()}_plan."
        )


def _folders() -> Any:
    """ComfyUI's `folder_paths`, in which the folder is known from now on; None where no ComfyUI runs."""
    folders = sys.modules.get("folder_paths")
    if folders is not None:
        # extra_model_paths.yaml may have named the folder before.
        folders.add_model_folder_path(FOLDER, str(Path(folders.models_dir) / FOLDER))
        paths, _ = folders.folder_names_and_paths[FOLDER]
        folders.folder_names_and_paths[FOLDER] = (paths, {PLAN_FILE_SUFFIX})
    return folders

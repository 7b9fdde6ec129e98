"""`diffsparse comfyui-uninstall`: takes away what `comfyui-install` put there, and nothing else."""

from __future__ import annotations

import argparse
import os
import shutil

from diffsparse.eval.comfyui_install import SOURCE, add_arguments, files, is_ours, node_folder

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Remove the folder, but for files of the user's own in it.

    Raises:
        ValueError: no ComfyUI is there, or the folder is not there or not DiffSparse's.
    """
    folder = node_folder(args.path)
    if not is_ours(folder):
        state = "is not DiffSparse's" if os.path.lexists(folder) else "is not there"
        raise ValueError(f"{folder} {state}, so there is nothing to remove.")
    for source in files():
        (folder / source.relative_to(SOURCE)).unlink(missing_ok=True)
    for cache in [path for path in folder.rglob("__pycache__") if path.is_dir()]:
        shutil.rmtree(cache)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    if kept := sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"Left in place, since DiffSparse did not put it there: {', '.join(map(str, kept))}")
    else:
        folder.rmdir()
        print(f"{folder} is gone. Restart ComfyUI.")
    return 0

"""`diffsparse comfyui-install`: the folder that shows the nodes to a ComfyUI."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

import diffsparse

FOLDER = "comfyui-diffsparse"
SOURCE = Path(diffsparse.__file__).parent / "comfy" / "custom_node"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where ComfyUI is."""
    parser.add_argument("path", type=Path, help="the folder of ComfyUI, in which custom_nodes is")


def run(args: argparse.Namespace) -> int:
    """Copy the folder, and say what is left to do.

    Raises:
        ValueError: no ComfyUI is there, or something else has the folder's name.
    """
    folder = node_folder(args.path)
    if os.path.lexists(folder) and not is_ours(folder):
        raise ValueError(
            f"{folder} is there already and is not DiffSparse's. Move it away, then run the command again."
        )
    for source in files():
        target = folder / source.relative_to(SOURCE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    print(f"The nodes are in {folder}.")
    print(f"This diffsparse belongs to {sys.executable}. If another Python runs ComfyUI, install it there too,")
    print("in a checkout of diffsparse:")
    print("  PYTHON_OF_COMFYUI -m pip install --no-deps .")
    print("Restart ComfyUI. Double-click the canvas and type DiffSparse, or look among the workflow templates.")
    return 0


def node_folder(comfyui: Path) -> Path:
    """Where the folder goes in a ComfyUI, or in the portable version for Windows around it.

    Raises:
        ValueError: neither has a folder custom_nodes.
    """
    for root in (comfyui, comfyui / "ComfyUI"):
        if (root / "custom_nodes").is_dir():
            return root / "custom_nodes" / FOLDER
    raise ValueError(
        f"{comfyui} is no ComfyUI: it has no folder custom_nodes. Name the folder that main.py of ComfyUI is in, or in "
        f"the desktop version the folder that you chose for your models and outputs."
    )


def is_ours(folder: Path) -> bool:
    """Whether a folder is one that this command made. What a link leads to, such as a checkout, is the user's own."""
    project = folder / "pyproject.toml"
    # Not asked whether it is a symbolic link: a junction of Windows is none, and leads elsewhere as well.
    is_here = Path(os.path.realpath(folder)) == Path(os.path.realpath(folder.parent)) / folder.name
    return is_here and project.is_file() and 'DisplayName = "DiffSparse"' in project.read_text(encoding="utf-8")


def files() -> list[Path]:
    """What the folder is made of."""
    return [path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]

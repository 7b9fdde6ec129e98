"""DiffSparse for ComfyUI: the nodes are in the package diffsparse, this folder only shows them to ComfyUI."""

import sys

try:
    from diffsparse.comfy import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
except ImportError as error:
    raise ImportError(
        f"DiffSparse: the package diffsparse is missing in the Python that runs ComfyUI, or too old ({error}). "
        f'Install it there from a checkout of diffsparse, and restart ComfyUI: "{sys.executable}" -m pip install '
        f"--no-deps ."
    ) from error

WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]

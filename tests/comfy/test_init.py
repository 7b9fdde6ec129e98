from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NOT_IN_COMFYUI = (
    "diffusers",
    "accelerate",
    "lpips",
    "transformers",
    "matplotlib",
    "imageio",
    "rich",
    "filelock",
    "triton",
)


def test_the_nodes_load_where_only_torch_is():
    # None in sys.modules makes an import fail.
    hidden = f"import sys; sys.modules.update(dict.fromkeys({NOT_IN_COMFYUI!r}))"
    shown = "from diffsparse.comfy import NODE_CLASS_MAPPINGS; print(*NODE_CLASS_MAPPINGS)"
    result = subprocess.run(
        [sys.executable, "-c", f"{hidden}; {shown}"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    names = ["DiffSparseAttention", "DiffSparseCalibrate", "DiffSparseReport", "DiffSparseTokenCount"]
    assert (result.returncode, result.stdout.split()) == (0, names), result.stderr

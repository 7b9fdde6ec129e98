"""Where kernels are launched: on the device of their tensors."""

from __future__ import annotations

import torch


def launch_on(device: torch.device) -> torch.cuda.device:
    """Launches go to the current device: make it the tensors' own. Nothing on the CPU, for the interpreter."""
    return torch.cuda.device(device if device.type == "cuda" else -1)

"""What the numbers of a benchmark depend on."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from diffsparse.eval.doctor import version_of

if TYPE_CHECKING:
    import torch


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """What the numbers depend on: processor or GPU, threads, versions."""
    import torch

    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
    }

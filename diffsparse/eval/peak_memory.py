"""The most memory that was taken meanwhile: on a GPU torch's own count, elsewhere the process's."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path


class PeakMemory:
    """Counts from when it is made.

    Attributes:
        kind: what is counted.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self.kind = "allocated on the GPU" if device.startswith("cuda") else "resident in the process"
        if device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(device)
            return
        self._resets = False
        with contextlib.suppress(OSError):
            # Sets the process's high-water mark back to what it holds now; proc(5).
            Path("/proc/self/clear_refs").write_text("5")
            self._resets = True

    @property
    def num_bytes(self) -> int | None:
        """The peak; None where the system does not tell it."""
        if self._device.startswith("cuda"):
            import torch

            return torch.cuda.max_memory_allocated(self._device)
        if not self._resets:
            return None
        match = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(match[1]) * 1024 if match else None

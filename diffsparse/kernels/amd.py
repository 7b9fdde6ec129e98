"""AMD's GPUs: which of them the Triton kernels are compiled for, and how. None has been at hand yet."""

from __future__ import annotations

from typing import Any

import torch

from diffsparse.kernels.quantization import PRECISIONS
from diffsparse.kernels.tuning import Tuning

WITH_MATRIX_PRODUCTS = ("gfx90a", "gfx942", "gfx950", "gfx11", "gfx12")
"""How the names of architectures begin: CDNA 2 to 4, RDNA 3 and 4."""
WITH_FP8_PRODUCTS = ("gfx950", "gfx12")
"""Of the numbers that PyTorch calls float8_e4m3fn. CDNA 3 multiplies others."""
SHARED_MEMORY = 64 * 1024
"""Bytes that a program may use; CDNA 4 has more."""
LARGEST_ROW = 512
"""Bytes of a head's numbers of one token, rounded up to a power of two: with more, a program does not fit there."""


def architecture(device: torch.device) -> str | None:
    """Such as "gfx942", where the device is a GPU of AMD; else None."""
    if device.type != "cuda" or torch.version.hip is None:
        return None
    properties: Any = torch.cuda.get_device_properties(device)  # PyTorch declares this one nowhere
    return str(properties.gcnArchName).partition(":")[0]


def why_not(name: str, precision: str = "native") -> str | None:
    """Why the Triton kernels do not run on an architecture in a precision; None where they do."""
    if not name.startswith(WITH_MATRIX_PRODUCTS):
        return f"{name} has no matrix instructions, which CDNA 2 (gfx90a) and RDNA 3 (gfx11) brought"
    formats = PRECISIONS[precision]
    if "fp8" in (formats.scores, formats.values) and not name.startswith(WITH_FP8_PRODUCTS):
        return f"{precision} needs CDNA 4 (gfx950) or RDNA 4 (gfx12), which multiply FP8, not {name}"
    return None


def tuning(name: str, query_block_size: int, key_block_size: int, padded_dim: int, precision: str) -> Tuning:
    """What fits into registers, by blocks in tokens and a head dim rounded up to a power of two.

    In 16 bits up to a head dim of 128, that is; there RDNA 3 spills a little without the pooled tail.
    """
    key_tile = 16 if name.startswith("gfx11") and padded_dim > 64 and PRECISIONS[precision].values == "native" else 32
    # A wave for each 16 queries, which is as many as the smallest product takes.
    num_warps = max(1, query_block_size // 16)
    return Tuning(min(key_tile, key_block_size), num_warps, num_stages=2 if name.startswith("gfx9") else 1)

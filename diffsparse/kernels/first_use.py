"""Kernels that PyTorch can stand in for, tried on a small input before their first use."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch

from diffsparse.kernels.launch import is_before_ampere, refuse_first_use_in_graph


def kernels_on(device: torch.device, module: str, what: str, check: Callable[[ModuleType], bool]) -> ModuleType | None:
    """The Triton kernels for `what` in a module beside this one, where they pass their check; None elsewhere.

    They run on NVIDIA GPUs from Ampere on. Callers keep the answer: the check waits for the device.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if device.type != "cuda" or torch.version.hip is not None or is_before_ampere(device):
        return None
    refuse_first_use_in_graph(device)
    name = f"diffsparse.kernels.{module}"
    return import_module(name) if is_right(what, lambda: check(import_module(name))) else None


def is_right(what: str, check: Callable[[], bool]) -> bool:
    """Whether the kernel for `what` passes its check. Where it fails or raises, a warning says why, once.

    A compiler or a driver may raise anything. Memory that runs out is raised on: it says nothing about the kernel, and
    who frees some and calls again shall have it. What the check makes is on the CPU, whatever the default device is.
    """
    try:
        with torch.device("cpu"):
            why = None if check() else "it is wrong on a small input"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    if why is not None:
        warnings.warn(
            f"diffsparse: the GPU kernel for {what} is left out, PyTorch is slower at it: {why}", stacklevel=2
        )
    return why is None

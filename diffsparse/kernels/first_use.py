"""Kernels that PyTorch can stand in for, tried on a small input before their first use."""

from __future__ import annotations

import warnings
from collections.abc import Callable


def is_right(what: str, check: Callable[[], bool]) -> bool:
    """Whether the kernel for `what` passes its check. Where it fails or raises, a warning says why, once.

    A compiler or a driver may raise anything.
    """
    try:
        why = None if check() else "it is wrong on a small input"
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    if why is not None:
        warnings.warn(
            f"diffsparse: the GPU kernel for {what} is left out, PyTorch is slower at it: {why}", stacklevel=2
        )
    return why is None

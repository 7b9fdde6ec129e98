"""Attention under torch.autocast: inputs as autocast makes them for torch's own attention, and then no more of it.

Autocast works call by call: within sparse attention it would change what single products compute in, and leave what
meets them in another dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def as_autocast(x: Tensor) -> Tensor:
    """What torch's own attention makes of an input x: in autocast's dtype where that is on, itself elsewhere."""
    if not _is_on(x.device) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast is off for this kind of device."""
    return torch.autocast(device.type, enabled=False) if _is_on(device) else contextlib.nullcontext()


def with_autocast_as_now(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """The call, as it is with autocast as it now is, wherever it is made."""
    if not _is_on(device):
        return call
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type))(call)


def _is_on(device: torch.device) -> bool:
    # torch.compile of 2.10 does not trace whether a device has autocast; what compiled code runs on has.
    has_autocast = (
        device.type != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(device.type)
    )
    return has_autocast and torch.is_autocast_enabled(device.type)

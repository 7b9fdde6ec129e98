"""Sizes that are nowhere but in the values of a tensor on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Size = TypeVar("Size")


def read_once(ids: Tensor, read: Callable[[Tensor], Size]) -> Size:
    """What `read` makes of the ids on the CPU, read from the device once for each object, and by each `read`.

    Reading waits for the device. Pipelines make that tensor once and pass the same object at each step, so one wait
    serves a generation. What was read is kept no longer than the object and not past a change in place. An inference
    tensor keeps no count of its changes, so it is read at each call.
    """
    if ids.is_inference():
        return read(ids.cpu())
    version, sizes = _SIZES.get(ids, (None, {}))
    if version != ids._version:
        _SIZES[ids] = ids._version, (sizes := {})
    if read not in sizes:
        sizes[read] = read(ids.cpu())
    size: Size = sizes[read]
    return size


_SIZES: Any = WeakIdKeyDictionary()
"""Position ids to their version, and what was read off them by each that reads."""

"""The implementations of block-sparse attention, and which of them can run where.

A backend is a module with `why_not` and `attend` as in `block_sparse_eager.py`, and a line in BACKENDS. One that hands
some of its work to another says so in `left_to`, as `block_sparse_gluon.py` does.
"""

from __future__ import annotations

import functools
import inspect
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from diffsparse.kernels.reorder import in_order

# Name and module, the fastest first. Imported when asked for: what a module needs may be missing here.
# "eager" runs anywhere, so that what stands after it is taken only by its name.
BACKENDS = {
    "gluon": "diffsparse.kernels.block_sparse_gluon",
    "triton": "diffsparse.kernels.block_sparse_triton",
    "eager": "diffsparse.kernels.block_sparse_eager",
    "flex": "diffsparse.kernels.block_sparse_flex",
}


def available_backends(device: torch.device | str, precision: str = "native") -> dict[str, str | None]:
    """Every backend by name, the fastest first, with the reason why it cannot run on the device, or None."""
    query = torch.empty((1, 1, 128, 64), dtype=torch.bfloat16, device=device)
    return {name: why_not(name, query, 128, 64, precision) for name in BACKENDS}


def why_not(
    name: str, query: Tensor, query_block_size: int, key_block_size: int, precision: str = "native"
) -> str | None:
    """Why the backend of this name cannot run on inputs like query [B, H, S, D], in these blocks; None where it can."""
    try:
        module = import_module(BACKENDS[name])
    except ImportError as error:
        return f"its module does not import ({error})"
    arguments = [query, query_block_size, key_block_size]
    # A backend that quantizes nothing need not know the word.
    if "precision" in inspect.signature(module.why_not).parameters:
        arguments.append(precision)
    elif precision != "native":
        return f"it does not compute in {precision}"
    reason: str | None = module.why_not(*arguments)
    return reason


def left_to(name: str, precision: str, key_block_size: int) -> str | None:
    """The backend that this one, which can run, hands such calls to; None where it computes them itself."""
    ask = getattr(import_module(BACKENDS[name]), "left_to", None)
    other: str | None = None if ask is None else ask(precision, key_block_size)
    return other


def in_order_for(
    module: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_order: Tensor | None,
    key_order: Tensor | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor | None]]:
    """Query, key and value as a backend's `attend` takes them, and its options for orders.

    A backend may put tokens in order itself, which saves a pass where it quantizes. None has to.
    """
    if _takes_orders(module):
        return (query, key, value), {"query_order": query_order, "key_order": key_order}
    return (in_order(query, query_order), in_order(key, key_order), in_order(value, key_order)), {}


@functools.cache
def _takes_orders(module: ModuleType) -> bool:
    return "query_order" in inspect.signature(module.attend).parameters

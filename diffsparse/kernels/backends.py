"""The implementations of block-sparse attention, and which of them can run where.

A backend is a module with `why_not` and `attend` as in `block_sparse_eager.py`, and a line in BACKENDS. One that hands
some of its work to another says so in `left_to`, as `block_sparse_gluon.py` does. Options that its `attend` does not
name are not asked of it, or done for it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from diffsparse.kernels.reorder import in_order, scatter_tokens

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
    if "precision" in _options_of(module.why_not):
        arguments.append(precision)
    elif precision != "native":
        return f"it does not compute in {precision}"
    reason: str | None = module.why_not(*arguments)
    return reason


def left_to(name: str, precision: str) -> str | None:
    """The backend that this one, which can run, hands such calls to; None where it computes them itself."""
    ask = getattr(import_module(BACKENDS[name]), "left_to", None)
    other: str | None = None if ask is None else ask(precision)
    return other


def takes_orders(name: str) -> bool:
    """Whether this backend, which can run, puts tokens in order itself: only keys and values take a pass for it."""
    return "query_order" in _options_of(import_module(BACKENDS[name]).attend)


def attend_with(
    module: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_blocks: Tensor,
    counts: Tensor,
    *,
    query_order: Tensor | None,
    key_order: Tensor | None,
    schedule: Tensor | None,
    precision: str,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What a backend gives for `block_sparse_attention`: output [B, H, S, D] and logsumexp, in query's own order.

    A backend may take tokens in an order and put them back itself, which saves passes over them, and may ask for a
    schedule. None has to.
    """
    # Kernels step through these by one.
    query_order, key_order, schedule = (
        x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (query_order, key_order, schedule)
    )
    taken = _options_of(module.attend)
    if precision != "native":
        options["precision"] = precision
    if "schedule" in taken:
        options["schedule"] = schedule
    if "query_order" in taken:
        options["query_order"], options["key_order"] = query_order, key_order
    else:
        query, key, value = in_order(query, query_order), in_order(key, key_order), in_order(value, key_order)
    out, lse = module.attend(query, key, value, key_blocks, counts, **options)
    # What was put in order is not needed any more: before the output comes back there is room for it.
    del query, key, value
    if query_order is not None and "query_order" not in taken:
        out = scatter_tokens(out, query_order)
        if options["return_lse"]:
            lse = torch.empty_like(lse).scatter_(2, query_order[None].expand_as(lse), lse)
    return out, lse


@functools.cache
def _options_of(function: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)

"""What a backend takes on a device, found by asking it about empty queries. Nothing is computed."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from diffsparse.kernels.backends import BACKENDS, left_to, why_not
from diffsparse.kernels.block_sparse import DTYPES, MAX_HEAD_DIM

# What is asked about. A backend may take larger blocks too.
HEAD_DIMS = range(1, MAX_HEAD_DIM + 1)
BLOCK_SIZES = range(1, 257)
# While one of them is asked about, the others are these; of the dtypes, the first that the backend takes.
USUAL_DTYPES = (torch.bfloat16, *(dtype for dtype in DTYPES if dtype != torch.bfloat16))
USUAL_HEAD_DIM, USUAL_QUERY_BLOCK, USUAL_KEY_BLOCK = 64, 128, 64
# Options by the argument of `attend` that a backend with them has.
FEATURES = {"tail": "pooled tail", "key_length": "key lengths", "return_lse": "logsumexp"}


@dataclass(frozen=True)
class Capability:
    """What a backend takes on a device in a precision.

    Attributes:
        dtypes: the usual first.
        head_dims, query_blocks, key_blocks: of HEAD_DIMS and BLOCK_SIZES.
        computed_by: the backend that computes, itself or the one that it leaves this precision to.
        reason: why it takes nothing, else None.
    """

    dtypes: tuple[torch.dtype, ...] = ()
    head_dims: tuple[int, ...] = ()
    query_blocks: tuple[int, ...] = ()
    key_blocks: tuple[int, ...] = ()
    computed_by: str | None = None
    reason: str | None = None


def capability(backend: str, device: torch.device | str, precision: str = "native") -> Capability:
    """What the backend takes on the device in the precision.

    Each is asked about with the others as usual: a backend whose head dims depended on its block sizes would need more.
    """

    def query(dtype: torch.dtype, head_dim: int = USUAL_HEAD_DIM) -> Tensor:
        return torch.empty((1, 1, 1, head_dim), dtype=dtype, device=device)

    def reason(query: Tensor, query_block: int = USUAL_QUERY_BLOCK, key_block: int = USUAL_KEY_BLOCK) -> str | None:
        return why_not(backend, query, query_block, key_block, precision)

    dtypes = tuple(dtype for dtype in USUAL_DTYPES if reason(query(dtype)) is None)
    if not dtypes:
        return Capability(reason=reason(query(USUAL_DTYPES[0])))
    usual = query(dtypes[0])
    return Capability(
        dtypes,
        tuple(head_dim for head_dim in HEAD_DIMS if reason(query(dtypes[0], head_dim)) is None),
        tuple(size for size in BLOCK_SIZES if reason(usual, query_block=size) is None),
        tuple(size for size in BLOCK_SIZES if reason(usual, key_block=size) is None),
        left_to(backend, precision) or backend,
    )


def features(backend: str) -> tuple[str, ...]:
    """Which of FEATURES a backend that can be imported has."""
    arguments = inspect.signature(import_module(BACKENDS[backend]).attend).parameters
    return tuple(name for argument, name in FEATURES.items() if argument in arguments)

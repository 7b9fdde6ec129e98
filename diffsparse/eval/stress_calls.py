"""What `diffsparse stress` tries: attention calls of one backend in one precision, at one size, with what is right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffsparse.eval.bench_suite import (
    BLOCK_SIZE,
    LARGEST_ERRORS,
    Geometry,
    error_of_sampled_rows,
    random_inputs,
    random_lists,
)
from diffsparse.grid import TokenGrid

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffsparse.kernels.self_test import SmallCase

DENSE = "dense"
"""The control: PyTorch's own attention. If that fails too, it is not our kernels."""
SIZES = ("full", "small")
CALLS = f"{__name__}:calls_of"
CHECKED_HEADS = 4


@dataclass(frozen=True)
class Subject:
    """What one process calls again and again.

    Attributes:
        backend: one of BACKENDS in `kernels/backends.py`, or DENSE.
        size: "full" is one call as of a model, "small" are many with all options.
        switched_off: what the backend does not take by itself, and is made to here.
    """

    backend: str
    precision: str
    size: str
    switched_off: bool
    device: str
    tokens: int
    heads: int
    head_dim: int
    density: float

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.backend} {self.precision}, {self.size}"


@dataclass(frozen=True)
class RepeatedCall:
    """One call on inputs that stay: its results are the same, bit by bit, each time that it is right.

    Attributes:
        error: how far results are off, relative.
        allowed: how far they may be.
    """

    name: str
    call: Callable[[], Sequence[Tensor]]
    error: Callable[[Sequence[Tensor]], float]
    allowed: float


def calls_of(fields: Mapping[str, Any]) -> list[RepeatedCall]:
    """The calls of a Subject of these fields, with inputs on its device; for a process of its own."""
    import torch

    subject = Subject(**fields)
    if subject.switched_off:
        from diffsparse.kernels import block_sparse_gluon

        block_sparse_gluon.QUANTIZES = True
    # What a kernel that fails its check at first use warns of; PyTorch would stand in for it, and pass for it.
    warnings.filterwarnings("error", message="diffsparse:")
    device = torch.device(subject.device)
    if subject.backend == DENSE:
        return [_full_dense(subject, device)] if subject.size == "full" else _small_dense(device)
    return _full(subject, device) if subject.size == "full" else _small(subject, device)


def why_not_full(backend: str, precision: str, head_dim: int, device: torch.device) -> str | None:
    """Why a backend cannot run at the full size; None if it can."""
    import torch

    from diffsparse.kernels.backends import why_not

    query = torch.empty((1, 1, BLOCK_SIZE, head_dim), dtype=_dtype(device), device=device)
    return why_not(backend, query, BLOCK_SIZE, BLOCK_SIZE, precision)


def small_cases(backend: str, precision: str, device: torch.device) -> list[SmallCase]:
    """The small calls that a backend can make."""
    from diffsparse.kernels.self_test import SmallCase

    # In 8 bits gluon leaves blocks of 64 keys to the Triton kernel.
    key_blocks = (BLOCK_SIZE,) if backend == "gluon" and precision != "native" else (64, BLOCK_SIZE)
    cases = [
        SmallCase(head_dim, BLOCK_SIZE, key_block_size, has_all, has_all, has_all)
        for head_dim in (64, 128)
        for key_block_size in key_blocks
        # Each is another kernel to compile, so not every combination.
        for has_all in (True, False)
    ]
    return [case for case in cases if case.why_not(backend, device, _dtype(device), precision) is None]


def _dtype(device: torch.device) -> torch.dtype:
    """As that of `random_inputs`."""
    import torch

    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _full(subject: Subject, device: torch.device) -> list[RepeatedCall]:
    from importlib import import_module

    import torch

    from diffsparse.kernels.backends import BACKENDS

    geometry = Geometry(subject.name, TokenGrid(1, 1, subject.tokens), subject.heads, subject.head_dim)
    query, key, value = random_inputs(geometry, device)
    key_blocks, counts = random_lists(geometry, subject.density, device)
    attend = import_module(BACKENDS[subject.backend]).attend

    def repeated(has_tail: bool) -> RepeatedCall:
        tail = torch.ones((1, 1), dtype=torch.bool, device=device) if has_tail else None

        # Not `block_sparse_attention`: that tests a backend first, and refuses one that fails.
        def call() -> Sequence[Tensor]:
            output, _ = attend(
                query,
                key,
                value,
                key_blocks,
                counts,
                query_block_size=BLOCK_SIZE,
                key_block_size=BLOCK_SIZE,
                key_length=None,
                tail=tail,
                scale=subject.head_dim**-0.5,
                return_lse=False,
                **({} if subject.precision == "native" else {"precision": subject.precision}),
            )
            return (output,)

        def error(results: Sequence[Tensor]) -> float:
            return _error(query, key, value, key_blocks, counts, results[0], has_tail)

        name = f"{subject.tokens} tokens{', tail' if has_tail else ''}"
        return RepeatedCall(name, call, error, LARGEST_ERRORS[subject.precision])

    return [repeated(has_tail=False), repeated(has_tail=True)]


def _full_dense(subject: Subject, device: torch.device) -> RepeatedCall:
    import torch
    from torch.nn import functional as F

    geometry = Geometry(subject.name, TokenGrid(1, 1, subject.tokens), subject.heads, subject.head_dim)
    query, key, value = random_inputs(geometry, device)
    num_blocks = -(-subject.tokens // BLOCK_SIZE)
    all_blocks = torch.arange(num_blocks).expand(1, subject.heads, num_blocks, -1)
    counts = torch.tensor(num_blocks).expand(1, subject.heads, num_blocks)
    return RepeatedCall(
        f"{subject.tokens} tokens",
        lambda: (F.scaled_dot_product_attention(query, key, value),),
        lambda results: _error(query, key, value, all_blocks, counts, results[0], tail=False),
        LARGEST_ERRORS["native"],
    )


def _error(
    query: Tensor, key: Tensor, value: Tensor, key_blocks: Tensor, counts: Tensor, output: Tensor, tail: bool
) -> float:
    """As `error_of_sampled_rows`, of a few heads on the CPU: on a busy device every row would wait for its turn."""
    import torch

    heads = torch.randperm(query.shape[1])[:CHECKED_HEADS]
    few = [x[:, heads.to(x.device)].cpu() for x in (query, key, value, key_blocks, counts, output)]
    return error_of_sampled_rows(few[0], few[1], few[2], few[3], few[4], few[5], tail)


def _small(subject: Subject, device: torch.device) -> list[RepeatedCall]:
    import torch

    from diffsparse.kernels.self_test import largest_error

    dtype = _dtype(device)
    generator = torch.Generator().manual_seed(0)

    def repeated(case: SmallCase) -> RepeatedCall:
        call = case.draw(dtype, subject.precision, generator).to(device)
        return RepeatedCall(
            f"head dim {case.head_dim}, {case.key_block_size} keys a block{', all options' * case.has_tail}",
            lambda: call.attend(subject.backend),
            lambda results: call.error((results[0], results[1])),
            largest_error(dtype, subject.precision),
        )

    return [repeated(case) for case in small_cases(subject.backend, subject.precision, device)]


def _small_dense(device: torch.device) -> list[RepeatedCall]:
    import torch
    from torch.nn import functional as F

    from diffsparse.kernels.self_test import NUM_TOKENS, largest_error

    dtype = _dtype(device)

    def repeated(head_dim: int) -> RepeatedCall:
        query, key, value = (torch.randn((2, 2, NUM_TOKENS, head_dim)).to(dtype) for _ in range(3))
        expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
        query, key, value = (x.to(device) for x in (query, key, value))
        return RepeatedCall(
            f"head dim {head_dim}",
            lambda: (F.scaled_dot_product_attention(query, key, value),),
            lambda results: float((results[0].cpu().double() - expected).norm() / expected.norm()),
            largest_error(dtype, "native"),
        )

    return [repeated(head_dim) for head_dim in (64, 128)]

"""What `diffsparse stress` tries: attention calls of one backend in one precision, at one size, with what is right."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffsparse.eval.bench_suite import KEYS_OF_PAIRS, LARGEST_ERRORS, SUITES
from diffsparse.eval.random_attention import BLOCK_SIZE, error_of_sampled_rows, random_inputs, random_lists
from diffsparse.eval.stress_trial import DENSE, RepeatedCall, Subject
from diffsparse.kernels.backends import BACKENDS
from diffsparse.kernels.self_test import SmallCase, largest_error

DENSITY = 0.25
CHECKED_HEADS = 4


def calls_of(fields: Mapping[str, Any]) -> list[RepeatedCall]:
    """The calls of a Subject of these fields, with inputs on its device; for a process of its own."""
    subject = Subject(**fields)
    # What a kernel that fails its check at first use warns of; PyTorch would stand in for it, and pass for it.
    warnings.filterwarnings("error", message="diffsparse:")
    if subject.size == "small":
        return _small(subject)
    kinds = [(BLOCK_SIZE, False)]
    if subject.backend != DENSE:
        kinds += [(BLOCK_SIZE, True), (KEYS_OF_PAIRS, True)]
    return [_full(subject, *kind) for kind in kinds]


def _full(subject: Subject, key_block_size: int, has_tail: bool) -> RepeatedCall:
    """One call as of Wan 2.1 14B on a GPU, of a tiny video elsewhere."""
    device = torch.device(subject.device)
    geometry = SUITES["gpu" if device.type == "cuda" else "tiny"][0]
    tokens = geometry.grid.num_tokens
    query, key, value = random_inputs(tokens, geometry.heads, geometry.head_dim, device)
    density = 1.0 if subject.backend == DENSE else DENSITY
    key_blocks, counts = random_lists(tokens, geometry.heads, density, device, (BLOCK_SIZE, key_block_size))

    # Not `block_sparse_attention`: that tests a backend first, and refuses one that fails.
    def call() -> Sequence[Tensor]:
        if subject.backend == DENSE:
            return (F.scaled_dot_product_attention(query, key, value),)
        output, _ = import_module(BACKENDS[subject.backend]).attend(
            query,
            key,
            value,
            key_blocks,
            counts,
            query_block_size=BLOCK_SIZE,
            key_block_size=key_block_size,
            key_length=None,
            tail=torch.ones((1, 1), dtype=torch.bool, device=device) if has_tail else None,
            scale=geometry.head_dim**-0.5,
            return_lse=False,
            **({} if subject.precision == "native" else {"precision": subject.precision}),
        )
        return (output,)

    def error(results: Sequence[Tensor]) -> float:
        # Of a few heads on the CPU: on a busy device every row would wait for its turn.
        heads = torch.randperm(geometry.heads)[:CHECKED_HEADS]
        q, k, v, blocks, n, output = (
            x[:, heads.to(x.device)].cpu() for x in (query, key, value, key_blocks, counts, results[0])
        )
        return error_of_sampled_rows(q, k, v, blocks, n, output, has_tail, key_block_size)

    name = f"{tokens} tokens, {key_block_size} keys a block{', tail' * has_tail}"
    return RepeatedCall(name, call, error, LARGEST_ERRORS[subject.precision])


def _small(subject: Subject) -> list[RepeatedCall]:
    dtype = torch.bfloat16 if torch.device(subject.device).type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def repeated(case: SmallCase) -> RepeatedCall:
        call = case.draw(dtype, subject.precision, generator).to(subject.device)
        return RepeatedCall(
            f"head dim {case.head_dim}, {case.key_block_size} keys a block{', all options' * case.has_tail}",
            lambda: call.attend(subject.backend),
            lambda results: call.error((results[0], results[1])),
            largest_error(dtype, subject.precision),
        )

    cases = [
        SmallCase(head_dim, BLOCK_SIZE, key_block_size, has_all, has_all, has_all)
        for head_dim in (64, 128)
        for key_block_size in (KEYS_OF_PAIRS, BLOCK_SIZE)
        # Each is another kernel to compile, so not every combination.
        for has_all in (True, False)
    ]
    takes = [case for case in cases if case.why_not(subject.backend, subject.device, dtype, subject.precision) is None]
    return [repeated(case) for case in takes]

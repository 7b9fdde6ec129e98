"""Whether a backend computes what it should: small odd inputs, every option, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module

import torch
from torch import Tensor

from diffsparse.kernels.backends import BACKENDS, attend_with, available_backends, why_not
from diffsparse.kernels.quantization import PRECISIONS
from diffsparse.kernels.reorder import in_order

# Relative error of a backend in fp32 against float64, on random inputs.
LARGEST_ERROR = 1e-4
# How far a quantized backend may be from the eager one, by what its values are in. Scores differ where a value falls to
# the other side of a half; weights where they are rounded relative to another largest weight: in FP8 by 3.6 % rms, in
# INT8, where a tile is less than a key block, by 1 %.
LARGEST_QUANTIZED_ERROR = {"native": 5e-3, "int8": 2e-2, "fp8": 5e-2}

# The second batch entry is shorter where there are key lengths.
SHORTER = 77


@dataclass(frozen=True)
class SmallCase:
    """What is asked of a backend in a call of batch 2 and 2 heads. There are as many queries as tokens if None."""

    head_dim: int
    query_block_size: int
    key_block_size: int
    has_tail: bool
    has_length: bool
    has_orders: bool = False
    num_tokens: int = 300
    num_queries: int | None = None

    def why_not(self, backend: str, device: torch.device | str, dtype: torch.dtype, precision: str) -> str | None:
        """Why a backend cannot take it; None if it can."""
        query = torch.empty((2, 2, self.num_tokens, self.head_dim), dtype=dtype, device=device)
        return why_not(backend, query, self.query_block_size, self.key_block_size, precision)

    def draw(self, dtype: torch.dtype, precision: str, generator: torch.Generator) -> SmallCall:
        """Random inputs on the CPU, and what they give."""
        tokens, queries = self.num_tokens, self.num_queries or self.num_tokens
        query, key, value = (
            torch.randn((2, 2, num, self.head_dim), generator=generator).to(dtype) for num in (queries, tokens, tokens)
        )
        rows, columns = -(-queries // self.query_block_size), -(-tokens // self.key_block_size)
        visible = torch.rand((2, 2, rows, columns), generator=generator) < 0.5
        visible[..., 0] = True
        key_blocks = visible.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        counts = visible.sum(dim=-1, dtype=torch.int32)
        tail = torch.tensor([[True, False]]) if self.has_tail else None
        key_length = torch.tensor([tokens, SHORTER], dtype=torch.int32) if self.has_length else None
        query_order = key_order = None
        if self.has_orders:
            query_order = torch.rand((2, queries), generator=generator).argsort(-1)
            # What does not exist stays last.
            first, last = (torch.rand((2, n), generator=generator).argsort(-1) for n in (SHORTER, tokens - SHORTER))
            key_order = torch.cat([first, SHORTER + last], dim=1)
        sides = {"tail": tail, "key_length": key_length, "query_order": query_order, "key_order": key_order}
        call = SmallCall(self, precision, (query, key, value, key_blocks, counts), sides)
        if precision == "native":
            query, key, value = in_order(query, query_order), in_order(key, key_order), in_order(value, key_order)
            expected = _float64_attention(
                query, key, value, visible, self.query_block_size, self.key_block_size, key_length, tail
            )
            if query_order is not None:
                output, lse = expected
                back = query_order.argsort(-1)
                expected = in_order(output, back), in_order(lse[..., None], back)[..., 0]
        else:
            expected = call.attend("eager")
        return replace(call, expected=expected)


@dataclass(frozen=True)
class SmallCall:
    """A case with inputs, as `attend` takes them.

    Attributes:
        inputs: query [2, 2, S, D], key and value [2, 2, S_k, D], key blocks and counts.
        sides: "tail", "key_length", "query_order" and "key_order", None where the case has none.
        expected: output [2, 2, S, D] and logsumexp [2, 2, S], on the CPU: in float64, or in a precision other than
            "native" the eager backend's in that precision.
    """

    case: SmallCase
    precision: str
    inputs: tuple[Tensor, ...]
    sides: dict[str, Tensor | None]
    expected: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device | str) -> SmallCall:
        """The same with its inputs on a device."""
        sides = {name: None if x is None else x.to(device) for name, x in self.sides.items()}
        return replace(self, inputs=tuple(x.to(device) for x in self.inputs), sides=sides)

    def attend(self, backend: str) -> tuple[Tensor, Tensor]:
        """Output and logsumexp by a backend, where the inputs are."""
        query, key, value, key_blocks, counts = self.inputs
        return attend_with(
            import_module(BACKENDS[backend]),
            query,
            key,
            value,
            key_blocks,
            counts,
            **self.sides,
            query_block_size=self.case.query_block_size,
            key_block_size=self.case.key_block_size,
            schedule=None,
            scale=self.case.head_dim**-0.5,
            return_lse=True,
            precision=self.precision,
        )

    def error(self, actual: tuple[Tensor, Tensor]) -> float:
        """The larger relative L2 error of output and logsumexp; NaN if either holds one."""
        assert self.expected is not None
        errors = [
            float((a.cpu().double() - e.double()).norm() / e.double().norm()) for a, e in zip(actual, self.expected)
        ]
        return _largest(errors)


# Every option, at every size that a backend may refuse; in the long ones lists have more tiles than fit a GPU's memory
# at a time, so that each place in it is used anew.
LONG = 2200
_SELF_TEST_CASES = (
    SmallCase(64, 64, 64, has_tail=False, has_length=False),
    SmallCase(40, 64, 64, has_tail=True, has_length=False),
    SmallCase(128, 64, 64, has_tail=False, has_length=True),
    SmallCase(64, 64, 64, has_tail=True, has_length=True, has_orders=True, num_queries=200),
    SmallCase(128, 128, 64, has_tail=True, has_length=False, has_orders=True, num_tokens=LONG),
    SmallCase(128, 128, 128, has_tail=False, has_length=False, has_orders=True, num_queries=200),
    SmallCase(64, 128, 64, has_tail=False, has_length=True),
    SmallCase(64, 128, 128, has_tail=True, has_length=True, num_tokens=LONG),
)


def largest_error(dtype: torch.dtype, precision: str) -> float:
    """The largest error of a self-test that a backend may have."""
    allowed = max(LARGEST_ERROR, 4 * torch.finfo(dtype).eps)
    if precision != "native":
        allowed += LARGEST_QUANTIZED_ERROR[PRECISIONS[precision].values]
    return allowed


def self_test(
    backend: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    precision: str = "native",
) -> float:
    """The largest relative L2 error of the backend against float64, over small odd random inputs and all options.

    In a precision other than "native", against the eager backend's on the CPU in the same precision.

    Runs on the given device, or else on the first kind of device where the backend can run.
    """
    if device is None:
        kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        device = next((kind for kind in kinds if available_backends(kind, precision).get(backend) is None), "cpu")
    generator = torch.Generator().manual_seed(0)
    errors = []
    # Whatever the default device is: inputs and the expected output are of the CPU.
    with torch.device("cpu"):
        for case in _SELF_TEST_CASES:
            reason = case.why_not(backend, device, dtype, precision)
            if reason is None:
                call = case.draw(dtype, precision, generator)
                errors.append(call.error(call.to(device).attend(backend)))
    if not errors:
        raise ValueError(f"`backend` {backend!r} cannot run on {device}: {reason}. Name another backend or device.")
    return _largest(errors)


def _largest(errors: list[float]) -> float:
    # Unlike max(), a sum keeps an error that is not a number.
    return max(errors) if sum(errors) < float("inf") else float("nan")


def _float64_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    query_block_size: int,
    key_block_size: int,
    key_length: Tensor | None,
    tail: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp with every logit written out, for the block map `visible` [B, H, Q, K]."""
    num_tokens, head_dim = key.shape[2:]
    query, key, value = query.double(), key.double(), value.double()
    visible = visible[:, :, torch.arange(query.shape[2]) // query_block_size]  # [B, H, S, K]
    block_of = torch.arange(num_tokens) // key_block_size
    exists = torch.arange(num_tokens) < (torch.tensor([num_tokens]) if key_length is None else key_length)[:, None]
    seen = visible[..., block_of] & exists[:, None, None]  # [B, H, S, S_k]
    logits = (query @ key.mT).masked_fill(~seen, -torch.inf) * head_dim**-0.5
    # [K, S_k] marks the tokens of each block.
    members = (block_of == torch.arange(visible.shape[-1])[:, None]) & exists[:, None]
    sizes = members.sum(dim=-1).double()  # [B, K]
    means = [members[:, None].double() @ x / sizes.clamp(min=1)[:, None, :, None] for x in (key, value)]
    in_tail = ~visible & (sizes > 0)[:, None, None]
    in_tail = torch.zeros_like(in_tail) if tail is None else in_tail & tail[..., None, None]
    tail_logits = query @ means[0].mT * head_dim**-0.5 + sizes.log()[:, None, None]
    logits = torch.cat([logits, tail_logits.masked_fill(~in_tail, -torch.inf)], dim=-1)
    return logits.softmax(dim=-1) @ torch.cat([value, means[1]], dim=2), logits.logsumexp(dim=-1)

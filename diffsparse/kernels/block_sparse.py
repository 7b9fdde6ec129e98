"""Block-sparse attention: each query block sees the key blocks that are listed for it.

The one way in: it checks, picks the backend, and calls it as one operator that torch.compile leaves whole.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from diffsparse.kernels.backends import BACKENDS, attend_with, why_not
from diffsparse.kernels.launch import is_out_of_memory, refuse_first_use_in_graph
from diffsparse.kernels.quantization import PRECISIONS
from diffsparse.kernels.self_test import largest_error, self_test

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_blocks: Tensor,
    counts: Tensor,
    *,
    query_block_size: int,
    key_block_size: int,
    key_length: Tensor | None = None,
    tail: Tensor | None = None,
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    schedule: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    precision: str = "native",
    backend: str | None = None,
    validate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of query [B, H, S, D] over the listed blocks of key and value [B, H, S_k, D].

    Query block i of a head sees the key blocks `key_blocks[b, h, i, :counts[b, h, i]]`; the rest of a list is ignored.
    `key_blocks` is [B|1, H|1, Q, C] int32, `counts` [B|1, H|1, Q] int32, from 1 to C. Block sizes are in tokens; the
    last block of either side may be ragged. Keys at or beyond `key_length` [B] int32 do not exist.

    Where `tail` [B|1, H|1] bool is true, every existing block that is not listed enters the same softmax as a single
    key: the mean of its keys, with the log of their number added to the logit, and the mean of its values.

    With `query_order` [H|1, S] int64 the tokens of query are taken in that order, with `key_order` those of key and
    value. Blocks and lists are then of tokens in their order; what is at or beyond a key length is so in either order.
    Each row is an arrangement of all tokens, which is not checked.

    Returns the output [B, H, S, D] in query's dtype and in the order that query came in, [B, S, H, D] in memory, as
    projections want it; with `return_lse` also the logsumexp of the scaled logits, tail included, [B, H, S] fp32,
    natural logarithm. Queries that see no existing key give 0 and -inf.

    `schedule` [B * H * Q] int32 is in which order a GPU starts the query blocks, which changes how long it takes and
    nothing else: what `heavy_first` makes of the counts of all heads, for who keeps it. Its numbers are not checked.

    `precision` is what the two matrix products are computed in, one of PRECISIONS in `quantization.py`: "native" is the
    inputs' dtype, the others quantize blocks of queries and keys, and some the values as well.

    `scale` is D ** -0.5 if None. `backend` None takes the fastest one that can run here. `validate=False` leaves out
    `check_lists`, which waits for the lists on a GPU; compiled code never makes it. There is no backward pass.
    Raises ValueError or TypeError for what does not fit.
    """
    _check_qkv(query, key, value)
    num_query_blocks = -(-query.shape[2] // _checked_block_size("query_block_size", query_block_size))
    num_key_blocks = -(-key.shape[2] // _checked_block_size("key_block_size", key_block_size))
    batch, heads = query.shape[:2]
    _check_side("key_blocks", key_blocks, query, torch.int32, "[B|1, H|1, Q, C]", (batch, heads, num_query_blocks, 0))
    _check_side("counts", counts, query, torch.int32, "[B|1, H|1, Q]", (batch, heads, num_query_blocks))
    if key_length is not None:
        _check_side("key_length", key_length, query, torch.int32, "[B]", (batch,))
    if tail is not None:
        _check_side("tail", tail, query, torch.bool, "[B|1, H|1]", (batch, heads))
    for name, order, x in (("query_order", query_order, query), ("key_order", key_order, key)):
        if order is not None:
            _check_order(name, order, x)
    if schedule is not None:
        _check_schedule(schedule, query, batch * heads * num_query_blocks)
    check_precision("precision", precision)
    if validate and not torch.compiler.is_compiling():
        check_lists(key_blocks, counts, num_key_blocks)
        pick_backend(backend, query, query_block_size, key_block_size, precision)
    out, lse = _operator(
        query,
        key,
        value,
        key_blocks,
        counts,
        key_length,
        tail,
        query_order,
        key_order,
        schedule,
        query_block_size,
        key_block_size,
        query.shape[3] ** -0.5 if scale is None else float(scale),
        return_lse,
        precision,
        backend,
    )
    return (out, lse) if return_lse else out


def check_lists(key_blocks: Tensor, counts: Tensor, num_key_blocks: int) -> None:
    """Raise ValueError unless counts are from 1 to C and what is listed are different blocks that exist.

    key_blocks [B|1, H|1, Q, C], counts [B|1, H|1, Q]. Waits for the values on a GPU.
    """
    capacity = key_blocks.shape[-1]
    fewest, most = (int(count) for count in counts.aminmax())
    if fewest < 1 or most > capacity:
        raise ValueError(
            f"`counts` must be from 1 to {capacity}, the length of the lists in `key_blocks`, got values from {fewest} "
            f"to {most}. A query block needs at least one key block: list the one it matters least to lose."
        )
    is_listed = torch.arange(capacity, device=counts.device) < counts[..., None]
    key_blocks, is_listed = torch.broadcast_tensors(key_blocks, is_listed)
    lowest, highest = (int(block) for block in key_blocks[is_listed].aminmax())
    if lowest < 0 or highest >= num_key_blocks:
        raise ValueError(
            f"`key_blocks` must list blocks from 0 to {num_key_blocks - 1}, got blocks from {lowest} to {highest}. "
            f"Pad a list after its count, not within it."
        )
    # What lies beyond a count is counted in a column of its own, which is cut off.
    times_listed = counts.new_zeros((*is_listed.shape[:-1], num_key_blocks + 1))
    times_listed.scatter_add_(-1, key_blocks.where(is_listed, num_key_blocks).long(), is_listed.to(counts.dtype))
    if int(times_listed[..., :-1].max()) > 1:
        batch_entry, head, query_block, block = (int(i) for i in (times_listed[..., :-1] > 1).nonzero()[0])
        raise ValueError(
            f"`key_blocks` must list a block at most once, got block {block} more than once in "
            f"[{batch_entry}, {head}, {query_block}]. Remove the repetition and lower `counts`."
        )


def check_precision(name: str, precision: object) -> None:
    """Raise ValueError unless this is a precision; `name` is the option's."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"`{name}` must be one of {', '.join(PRECISIONS)}, got {precision!r}. "
            f"Leave it out to compute in the inputs' dtype."
        )


def pick_backend(
    name: str | None, query: Tensor, query_block_size: int, key_block_size: int, precision: str = "native"
) -> ModuleType:
    """The module of the named backend, or of the fastest one that can run. ValueError if it cannot.

    A precision that this one does not compute in is an error: a slower one that does would be no gain, and nobody would
    know why. One that fails its self-test in the precision is left out like any that fails, with a warning.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"`backend` must be one of {', '.join(BACKENDS)}, got {name!r}. Leave it out for the fastest one."
        )
    reasons = {}
    for candidate in BACKENDS if name is None else (name,):
        reasons[candidate] = _why_not_right(candidate, query, query_block_size, key_block_size, "native")
        if reasons[candidate] is not None:
            continue
        if precision != "native":
            if (reason := why_not(candidate, query, query_block_size, key_block_size, precision)) is not None:
                raise ValueError(
                    f"`precision` {precision!r} cannot run here: {candidate}: {reason}. "
                    f"Take another one of {', '.join(PRECISIONS)}, or name another backend."
                )
            reasons[candidate] = _why_not_right(candidate, query, query_block_size, key_block_size, precision)
            if reasons[candidate] is not None:
                continue
        return import_module(BACKENDS[candidate])
    if name is None:
        asked = "Sparse attention" if precision == "native" else f"`precision` {precision!r}"
        way_out = "Use dense attention" if precision == "native" else f"Take another one of {', '.join(PRECISIONS)}"
        raise ValueError(f"{asked} cannot run here: {_joined(reasons)}. {way_out}.")
    raise ValueError(f"`backend` {name!r} cannot run here: {_joined(reasons)}. Leave it out for the fastest that can.")


def why_none(query: Tensor, query_block_size: int, key_block_size: int) -> str | None:
    """Why no backend can run such a call; None if one can. Tries those on this device that nobody has tried yet."""
    reasons = {}
    for name in BACKENDS:
        if (reason := _why_not_right(name, query, query_block_size, key_block_size, "native")) is None:
            return None
        reasons[name] = reason
    return _joined(reasons)


def _joined(reasons: Mapping[str, str | None]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in reasons.items())


def backend_taken(
    device: torch.device | str, dtype: torch.dtype, head_dim: int, query_block_size: int, key_block_size: int
) -> str:
    """The name of the backend that such a call runs in unless one is named. ValueError if none can."""
    query = torch.empty((1, 1, 1, head_dim), dtype=dtype, device=device)
    module = pick_backend(None, query, query_block_size, key_block_size)
    return next(name for name, of_name in BACKENDS.items() if of_name == module.__name__)


def _why_not_right(name: str, query: Tensor, query_block_size: int, key_block_size: int, precision: str) -> str | None:
    reason = why_not(name, query, query_block_size, key_block_size, precision)
    if reason is None and query.device.type != "cpu":
        reason = _why_not_trusted(name, query.device, query.dtype, precision)
    return reason


@functools.cache
def _why_not_trusted(name: str, device: torch.device, dtype: torch.dtype, precision: str) -> str | None:
    """What the backend's self-test found before its first use on this device and dtype, None if it is right.

    Warns once where it is not: what takes its place is slower.
    """
    refuse_first_use_in_graph(device)
    why = None
    try:
        error = self_test(name, device, dtype, precision)
    except Exception as failure:  # a compiler or a driver may raise anything; there is another backend
        if is_out_of_memory(failure):  # another call, with more of it, shall not go without the backend
            raise
        why = f"its self-test failed ({type(failure).__name__}: {failure})"
    else:
        allowed = largest_error(dtype, precision)
        # Not `error > allowed`, which is false for an error that is not a number.
        if not error <= allowed:
            why = f"its self-test is off by {error:.1e}, {allowed:.1e} is allowed"
    if why is not None:
        kind = dtype if precision == "native" else f"{dtype}, {precision}"
        warnings.warn(f"diffsparse: the backend {name} is left out for {kind}: {why}", stacklevel=2)
    return why


@torch.library.custom_op(
    "diffsparse::block_sparse_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor key_blocks, Tensor counts, Tensor? key_length, "
    "Tensor? tail, Tensor? query_order, Tensor? key_order, Tensor? schedule, SymInt query_block_size, "
    "SymInt key_block_size, float scale, bool return_lse, str precision, str? backend) -> (Tensor, Tensor)",
)
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_blocks: Tensor,
    counts: Tensor,
    key_length: Tensor | None,
    tail: Tensor | None,
    query_order: Tensor | None,
    key_order: Tensor | None,
    schedule: Tensor | None,
    query_block_size: int,
    key_block_size: int,
    scale: float,
    return_lse: bool,
    precision: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    module = pick_backend(backend, query, query_block_size, key_block_size, precision)
    out, lse = attend_with(
        module,
        query,
        key,
        value,
        key_blocks,
        counts,
        query_block_size=query_block_size,
        key_block_size=key_block_size,
        # Kernels step by one from one batch entry to the next.
        key_length=None if key_length is None else key_length.contiguous(),
        tail=tail,
        query_order=query_order,
        key_order=key_order,
        schedule=schedule,
        scale=scale,
        return_lse=return_lse,
        precision=precision,
    )
    # As it is registered below.
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


@_operator.register_fake
def _(query: Tensor, *inputs: object) -> tuple[Tensor, Tensor]:
    return_lse = inputs[-3]
    out = query.new_empty([query.shape[i] for i in (0, 2, 1, 3)]).transpose(1, 2)
    return out, query.new_empty(query.shape[:3] if return_lse else (0,), dtype=torch.float32)


def _check_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"`{name}` must be a tensor [B, H, S, D], got {type(x).__name__}. Convert it first.")
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"`{name}` must be [B, H, S, D] and not empty, got the shape {tuple(x.shape)}.")
        if x.dtype not in DTYPES:
            raise TypeError(f"`{name}` must be float32, bfloat16 or float16, got {x.dtype}. Convert it with `.to()`.")
        if x.dtype != query.dtype:
            raise TypeError(f"`{name}` must have query's dtype {query.dtype}, got {x.dtype}. Convert it with `.to()`.")
        if x.device != query.device:
            raise ValueError(f"`{name}` must be on query's device {query.device}, got {x.device}. Move it there.")
        if (x.shape[0], x.shape[1], x.shape[3]) != (query.shape[0], query.shape[1], query.shape[3]):
            raise ValueError(
                f"`{name}` must have query's batch, heads and head dim {tuple(query.shape)}, got {tuple(x.shape)}. "
                f"Repeat keys and values that several heads share."
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"`{name}` requires grad, and block-sparse attention has no backward pass. "
                f"Use dense attention for training, or call it under `torch.no_grad()`."
            )
    if key.shape != value.shape:
        raise ValueError(
            f"`value` must have as many tokens as key, {key.shape[2]}, got {value.shape[2]}. Cut or pad one of them."
        )
    if query.shape[3] > MAX_HEAD_DIM:
        raise ValueError(
            f"`query` must have a head dim of at most {MAX_HEAD_DIM}, got {query.shape[3]}. Use dense attention."
        )


def _checked_block_size(name: str, block_size: int) -> int:
    if isinstance(block_size, bool) or not isinstance(block_size, (int, torch.SymInt)):
        raise TypeError(f"`{name}` must be a whole number of tokens, got {block_size!r}. Use 64 or 128.")
    if block_size < 1:
        raise ValueError(f"`{name}` must be at least one token, got {block_size}. Use 64 or 128.")
    return block_size


def _check_order(name: str, order: Tensor, x: Tensor) -> None:
    if not isinstance(order, Tensor):
        raise TypeError(f"`{name}` must be a tensor [H|1, S] of torch.int64, got {type(order).__name__}.")
    if order.dtype != torch.int64:
        raise TypeError(f"`{name}` must be torch.int64, got {order.dtype}. Convert it with `.long()`.")
    if order.device != x.device:
        raise ValueError(f"`{name}` must be on query's device {x.device}, got {order.device}. Move it there.")
    if order.dim() != 2 or order.shape[0] not in (1, x.shape[1]) or order.shape[1] != x.shape[2]:
        raise ValueError(
            f"`{name}` must be [H|1, S], here ({x.shape[1]} or 1, {x.shape[2]}), got the shape {tuple(order.shape)}. "
            f"A row says which token comes at each place."
        )


def _check_schedule(schedule: Tensor, query: Tensor, size: int) -> None:
    what = f"a tensor [B * H * Q], here ({size},), of torch.int32"
    if not isinstance(schedule, Tensor):
        raise TypeError(f"`schedule` must be {what}, got {type(schedule).__name__}. Leave it out to have it made.")
    if schedule.dtype != torch.int32 or schedule.shape != (size,):
        raise ValueError(
            f"`schedule` must be {what}, got {tuple(schedule.shape)} of {schedule.dtype}. Leave it out to have it made."
        )
    if schedule.device != query.device:
        raise ValueError(f"`schedule` must be on query's device {query.device}, got {schedule.device}. Move it there.")


def _check_side(name: str, x: Tensor, query: Tensor, dtype: torch.dtype, shape: str, sizes: tuple[int, ...]) -> None:
    """Check x against `sizes`: batch and heads may be 1 in anything but `[B]`, 0 stands for any size but none."""
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` must be a tensor {shape} of {dtype}, got {type(x).__name__}. Convert it first.")
    if x.dtype != dtype:
        raise TypeError(f"`{name}` must be {dtype}, got {x.dtype}. Convert it with `.to({dtype})`.")
    if x.device != query.device:
        raise ValueError(f"`{name}` must be on query's device {query.device}, got {x.device}. Move it there.")
    fits = x.dim() == len(sizes) and all(
        size > 0 if expected == 0 else size == expected or (size == 1 and axis < 2 and len(sizes) > 1)
        for axis, (size, expected) in enumerate(zip(x.shape, sizes))
    )
    if not fits:
        wanted = ", ".join(str(size) if size else "C" for size in sizes)
        raise ValueError(
            f"`{name}` must be {shape}, here ({wanted}), got the shape {tuple(x.shape)}. "
            f"Q is the tokens of query over `query_block_size`, rounded up; B and H may be 1."
        )

"""What holds for every kernel that runs in Triton's interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _kernels_stay_in_their_tensors(monkeypatch):
    """A kernel reads and writes where its tensors lie, nowhere else.

    On a GPU what lies beside a tensor mostly belongs to the same process: a kernel that reads it and throws it away is
    right until the day when nothing lies there.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorDescriptor

    spans = []

    def start(executor, arguments, options, take=GridExecutor._init_args_hst):
        taken, taken_options = take(executor, arguments, options)
        tensors = [x.base if isinstance(x, TensorDescriptor) else x for x in (*taken, *taken_options.values())]
        spans[:] = [_span(x) for x in tensors if hasattr(x, "data_ptr") and x.numel()]
        return taken, taken_options

    def checked(access, place_of_pointers, place_of_mask):
        def check(builder, *arguments, **options):
            pointers, mask = arguments[place_of_pointers], arguments[place_of_mask].data
            size = pointers.get_element_ty().primitive_bitwidth // 8
            first = np.broadcast_to(pointers.data, mask.shape)[mask].astype(np.int64)
            inside = np.zeros(first.shape, dtype=bool)
            for begin, end in spans:
                inside |= (first >= begin) & (first + size <= end)
            assert inside.all(), f"{access.__name__} outside of every tensor, by program {builder.grid_idx}"
            return access(builder, *arguments, **options)

        return check

    monkeypatch.setattr(GridExecutor, "_init_args_hst", start)
    for access, *places in (
        (InterpreterBuilder.create_masked_load, 0, 1),
        (InterpreterBuilder.create_masked_store, 0, 2),
        (InterpreterBuilder.create_atomic_rmw, 1, 3),
    ):
        monkeypatch.setattr(InterpreterBuilder, access.__name__, checked(access, *places))


def _span(x):
    """Where the numbers of a tensor begin and end, in bytes."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()

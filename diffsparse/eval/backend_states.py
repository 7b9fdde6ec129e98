"""What every kernel backend takes on a device, and whether its numbers are right there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffsparse.kernels.capabilities import Capability, capability, features
from diffsparse.kernels.quantization import PRECISIONS
from diffsparse.kernels.self_test import largest_error, self_test


@dataclass(frozen=True)
class SelfTest:
    """What a backend's self-test found in a precision.

    Attributes:
        precision: one of PRECISIONS.
        dtype: of queries, keys and values; None where the backend takes none in this precision.
        error: the largest relative error, against float64 or, quantized, the eager backend on the CPU, which itself is
            not tried there; None where nothing was computed.
        allowed: how large it may be.
        reason: why the backend did not compute this, or not rightly; None if it did.
    """

    precision: str
    dtype: torch.dtype | None = None
    error: float | None = None
    allowed: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class BackendState:
    """A backend on a device: what it takes by precision, its options, and what its self-tests found.

    `self_tests` is empty where it takes nothing, and `reason` says why.
    """

    backend: str
    capabilities: dict[str, Capability]
    features: tuple[str, ...]
    self_tests: tuple[SelfTest, ...]
    reason: str | None

    @property
    def works(self) -> bool:
        """Its numbers are right in some dtype as it is. A precision alone is no use: no call would get there."""
        return any(test.precision == "native" and test.reason is None for test in self.self_tests)


def backend_state(backend: str, device: str) -> BackendState:
    """The backend asked and tried on the device.

    Native in every dtype, on a GPU only those of 16 bits, which models run in there: compiling takes its time. In each
    other precision in the first dtype.
    """
    capabilities = {precision: capability(backend, device, precision) for precision in PRECISIONS}
    if all(found.reason is not None for found in capabilities.values()):
        return BackendState(backend, capabilities, (), (), capabilities["native"].reason)
    tests = []
    for precision, found in capabilities.items():
        if found.reason is not None:
            tests.append(SelfTest(precision, reason=found.reason))
        elif found.computed_by != backend:
            tests.append(SelfTest(precision, found.dtypes[0], reason=f"left to {found.computed_by}"))
        elif (backend, device) == ("eager", "cpu") and precision != "native":
            tests.append(SelfTest(precision, found.dtypes[0], reason="the reference itself"))
        else:
            dtypes = found.dtypes if precision == "native" else found.dtypes[:1]
            if torch.device(device).type != "cpu":
                dtypes = tuple(dtype for dtype in dtypes if dtype.itemsize == 2) or dtypes
            tests += [_tried(backend, device, dtype, precision) for dtype in dtypes]
    return BackendState(backend, capabilities, features(backend), tuple(tests), None)


def _tried(backend: str, device: str, dtype: torch.dtype, precision: str) -> SelfTest:
    allowed = largest_error(dtype, precision)
    try:
        error = self_test(backend, device, dtype, precision)
    # Whatever a broken compiler or driver raises is the answer that doctor is asked for.
    except Exception as failure:
        return SelfTest(precision, dtype, None, allowed, f"failed with {type(failure).__name__}: {failure}")
    # Not `error > allowed`, which is false for an error that is not a number.
    return SelfTest(precision, dtype, error, allowed, None if error <= allowed else "wrong")

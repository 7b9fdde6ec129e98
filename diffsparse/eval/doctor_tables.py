"""The tables of `diffsparse doctor`, to be read in 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from rich.markup import escape
from rich.table import Table

from diffsparse.eval.backend_states import BackendState, SelfTest
from diffsparse.kernels.capabilities import BLOCK_SIZES, HEAD_DIMS, Capability

# A compiler's message may have pages; the JSON file has all of it.
LONGEST_REASON = 300


def backends_table(states: dict[str, list[BackendState]]) -> Table:
    """What each backend takes, by device."""
    table = Table(
        title="Kernel backends, and what each takes",
        caption=f"Asked about head dims up to {HEAD_DIMS[-1]} and blocks of up to {BLOCK_SIZES[-1]} tokens.",
        show_lines=True,
    )
    table.add_column("backend", no_wrap=True)
    table.add_column("device", no_wrap=True)
    table.add_column("takes")
    for device, of_device in states.items():
        for state in of_device:
            takes = "\n".join(_takes(state)) if state.reason is None else f"nothing: {_cut(state.reason)}"
            table.add_row(state.backend, device, takes)
    return table


def self_tests_table(states: dict[str, list[BackendState]]) -> Table:
    """Each self-test, its error beside what is allowed."""
    table = Table(
        title="Self-tests",
        caption="Native: against float64. Other precisions: against eager on the CPU in the same one.",
    )
    for column in ("backend", "device", "dtype", "precision", "error", "allowed"):
        table.add_column(column, no_wrap=True)
    table.add_column("result")
    for device, of_device in states.items():
        for state in of_device:
            for test in state.self_tests:
                table.add_row(state.backend, device, *_cells(test))
            if state.self_tests:
                table.add_section()
    return table


def dtype_name(dtype: torch.dtype) -> str:
    """Its name without the package's."""
    return str(dtype).removeprefix("torch.")


def as_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, three or more in a row as the first and the last: "1 to 256", "64, 128"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ", ".join(
        f"{row[0]} to {row[-1]}" if len(row) > 2 else ", ".join(str(number) for number in row) for row in ranges
    )


def _takes(state: BackendState) -> list[str]:
    taken = {precision: found for precision, found in state.capabilities.items() if found.reason is None}
    usual = next(iter(taken.values()))
    alike: dict[str, list[str]] = {}
    for precision, found in taken.items():
        alike.setdefault(_peculiarities(state.backend, found, usual), []).append(precision)
    return [
        ", ".join(dtype_name(dtype) for dtype in usual.dtypes),
        f"head dims {as_ranges(usual.head_dims)}",
        f"query blocks of {as_ranges(usual.query_blocks)}; key blocks of {as_ranges(usual.key_blocks)}",
        *(", ".join(precisions) + peculiarities for peculiarities, precisions in alike.items()),
        ", ".join(state.features),
    ]


def _peculiarities(backend: str, found: Capability, usual: Capability) -> str:
    """What a precision takes that is not as in the usual one, and which other backend computes it; or nothing."""
    different = []
    if found.dtypes != usual.dtypes:
        different.append(", ".join(dtype_name(dtype) for dtype in found.dtypes))
    for name, numbers, usual_numbers in (
        ("head dims", found.head_dims, usual.head_dims),
        ("query blocks of", found.query_blocks, usual.query_blocks),
        ("key blocks of", found.key_blocks, usual.key_blocks),
    ):
        if numbers != usual_numbers:
            different.append(f"{name} {as_ranges(numbers)}")
    if found.computed_by != backend:
        different.append(f"computed by {found.computed_by}")
    return f": {'; '.join(different)}" if different else ""


def _cells(test: SelfTest) -> tuple[str, ...]:
    return (
        "" if test.dtype is None else dtype_name(test.dtype),
        test.precision,
        "" if test.error is None else f"{test.error:.1e}",
        "" if test.allowed is None else f"{test.allowed:.1e}",
        "passed" if test.reason is None else _cut(test.reason),
    )


def _cut(reason: str) -> str:
    return escape(textwrap.shorten(reason, LONGEST_REASON, placeholder=" ..."))

"""`diffsparse doctor`: what this machine can run, with a self-test of each kernel backend."""

from __future__ import annotations

import argparse
import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsparse.eval.environment import architecture, devices, versions
from diffsparse.eval.output_file import check_output_file, write_json

if TYPE_CHECKING:
    from diffsparse.eval.backend_states import BackendState

# Of queries and of keys, in tokens: what `Adaptive` makes of long and of short sequences.
USUAL_BLOCKS = ((128, 64), (64, 64))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing to choose but a file."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all that was found to FILE")


def run(args: argparse.Namespace) -> int:
    """Print what there is; 0 when some backend can run and its numbers are right, else 1."""
    from rich.console import Console
    from rich.table import Table

    from diffsparse.eval.backend_states import backend_state
    from diffsparse.eval.doctor_tables import backends_table, dtype_name, self_tests_table
    from diffsparse.kernels.backends import BACKENDS

    check_output_file("`--json`", args.json)
    console = Console()
    machine = Table("what", "here", title="This machine")
    for name, version in versions().items():
        machine.add_row(name, version)
    for name, description in devices().items():
        machine.add_row(name, description)
    console.print(machine)

    alike = alike_devices()
    with console.status("Testing the kernel backends; compiling them may take minutes"):
        states = {label: [backend_state(backend, names[0]) for backend in BACKENDS] for label, names in alike.items()}
        taken = {label: taken_by_blocks(names[0]) for label, names in alike.items()}
    console.print(backends_table(states))
    console.print(self_tests_table(states))

    families = Table("family", "transformers", title="Model families")
    for family, transformers in known_families().items():
        families.add_row(family, ", ".join(transformers))
    console.print(families)

    for label, names in alike.items():
        others = f" (and {', '.join(names[1:])})" if names[1:] else ""
        console.print(f"{label}{others}: bfloat16 of head dim 128 runs {in_words(taken[label], names[0])}.")
    works = any(state.works for of_device in states.values() for state in of_device)
    console.print("Sparse attention can run here." if works else "No backend can run here: see the reasons above.")
    if args.json is not None:
        write_json(args.json, as_dict(alike, states, taken), dtype_name)
    return 0 if works else 1


def alike_devices() -> dict[str, tuple[str, ...]]:
    """Names of the devices of each kind, by the first one's name and architecture: "cuda:0, sm_90".

    CUDA devices are of one kind if they have the same name and architecture.
    """
    import torch

    found: dict[tuple[str, ...], list[str]] = {}
    for name in devices():
        kind: tuple[str, ...] = (name,)
        if torch.device(name).type == "cuda":
            index = torch.device(name).index
            kind = (torch.cuda.get_device_properties(index).name, architecture(index))
        found.setdefault(kind, []).append(name)
    return {", ".join((names[0], *kind[1:])): tuple(names) for kind, names in found.items()}


def taken_by_blocks(device: str) -> dict[tuple[int, int], str | None]:
    """The backend that takes a call in bfloat16 of head dim 128, by each of USUAL_BLOCKS; None where none does."""
    import torch

    from diffsparse.kernels.block_sparse import backend_taken

    taken: dict[tuple[int, int], str | None] = dict.fromkeys(USUAL_BLOCKS)
    for blocks in USUAL_BLOCKS:
        with contextlib.suppress(ValueError):
            taken[blocks] = backend_taken(device, torch.bfloat16, 128, *blocks)
    return taken


def in_words(taken: dict[tuple[int, int], str | None], device: str) -> str:
    """Which backend that is: "in gluon in blocks of 128 x 64 tokens, in triton in blocks of 64 x 64"."""
    names = {
        blocks: "in no backend" if name is None else f"in {name}{', slowly' * (name == 'eager' and device != 'cpu')}"
        for blocks, name in taken.items()
    }
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{name} in blocks of {query} x {key}" for (query, key), name in names.items())


def as_dict(
    alike: dict[str, tuple[str, ...]],
    states: dict[str, list[BackendState]],
    taken: dict[str, dict[tuple[int, int], str | None]],
) -> dict[str, Any]:
    """All that was found, for JSON but for the dtypes; head dims and block sizes as the tables show them.

    JSON has no word for an error that is not a number: it is None, and the reason says that it is wrong.
    """
    from diffsparse.eval.doctor_tables import as_ranges

    ranges = ("head_dims", "query_blocks", "key_blocks")
    return {
        "versions": versions(),
        "devices": devices(),
        "kinds_of_devices": {
            label: {
                "devices": names,
                "bfloat16_of_head_dim_128_runs_in": {f"{q} x {k}": name for (q, k), name in taken[label].items()},
                "backends": [
                    {
                        **vars(state),
                        "works": state.works,
                        "capabilities": {
                            precision: vars(found) | {name: as_ranges(getattr(found, name)) for name in ranges}
                            for precision, found in state.capabilities.items()
                        },
                        "self_tests": [
                            vars(test) | {"error": test.error if math.isfinite(test.error or 0) else None}
                            for test in state.self_tests
                        ],
                    }
                    for state in states[label]
                ],
            }
            for label, names in alike.items()
        },
        "families": known_families(),
    }


def known_families() -> dict[str, tuple[str, ...]]:
    """The transformer classes of each model family."""
    from diffsparse.pipelines.families import FAMILIES

    return {family.name: tuple(family.transformers) for family in FAMILIES}

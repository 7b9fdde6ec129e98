"""`diffsparse doctor`: what this machine can run, with a self-test of each kernel backend."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from dataclasses import dataclass

PACKAGES = ("diffsparse", "torch", "diffusers", "transformers", "triton", "accelerate")

# float32 against float64, both sums of a few hundred terms: errors around 1e-6. A wrong mask is off by 0.1 or more.
LARGEST_ERROR = 1e-4


@dataclass(frozen=True)
class BackendState:
    """One backend on one kind of device: its largest relative error against float64, or why it cannot run."""

    device: str
    backend: str
    error: float | None
    reason: str | None

    @property
    def works(self) -> bool:
        """It ran, and its numbers are right."""
        return self.reason is None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing to choose."""


def run(args: argparse.Namespace) -> int:
    """Print what there is; 0 when some backend can run and its numbers are right, else 1."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    machine = Table("what", "here", title="This machine")
    for name, version in versions().items():
        machine.add_row(name, version)
    for name, description in devices().items():
        machine.add_row(name, description)
    console.print(machine)

    states = backend_states()
    backends = Table("backend", "device", "can run", "largest error against float64", title="Kernel backends")
    for state in states:
        error = "" if state.error is None else f"{state.error:.1e}"
        backends.add_row(state.backend, state.device, "yes" if state.works else f"no: {state.reason}", error)
    console.print(backends)

    families = Table("family", "transformers", title="Model families")
    for family, transformers in known_families().items():
        families.add_row(family, ", ".join(transformers))
    console.print(families)

    works = any(state.works for state in states)
    console.print("Sparse attention can run here." if works else "No backend can run here: see the reasons above.")
    return 0 if works else 1


def versions() -> dict[str, str]:
    """The version of Python and of each package that matters here."""
    found = {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> dict[str, str]:
    """The processor and the accelerators that torch sees."""
    import torch

    found = {"cpu": f"{os.cpu_count()} cores, of which torch uses {torch.get_num_threads()}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gibibytes = properties.total_memory / 2**30
        found[f"cuda:{index}"] = f"{properties.name}, {gibibytes:.0f} GiB, sm_{properties.major}{properties.minor}"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def backend_states() -> list[BackendState]:
    """Every kernel backend on every kind of device here, tried."""
    import torch

    from diffsparse.kernels.backends import available_backends

    kinds = dict.fromkeys(name.partition(":")[0] for name in devices())
    return [
        _try(kind, backend, reason)
        for kind in kinds
        for backend, reason in available_backends(torch.device(kind)).items()
    ]


def known_families() -> dict[str, tuple[str, ...]]:
    """The transformer classes of each model family."""
    from diffsparse.pipelines.families import FAMILIES

    return {family.name: tuple(family.transformers) for family in FAMILIES}


def _try(device: str, backend: str, reason: str | None) -> BackendState:
    from diffsparse.kernels.self_test import self_test

    if reason is not None:
        return BackendState(device, backend, None, reason)
    try:
        error = self_test(backend, device)
    # Whatever a broken compiler or driver raises is the answer that doctor is asked for.
    except Exception as failure:
        return BackendState(device, backend, None, f"its self-test failed with {type(failure).__name__}: {failure}")
    # Not `error > LARGEST_ERROR`, which is false for an error that is not a number.
    if not error <= LARGEST_ERROR:
        return BackendState(device, backend, error, f"its self-test is wrong, at most {LARGEST_ERROR:.0e} expected")
    return BackendState(device, backend, error, None)

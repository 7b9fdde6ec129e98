"""What a result was made with, and what its times depend on: machine, versions, revision."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("diffsparse", "torch", "diffusers", "transformers", "triton", "accelerate")
PACKAGE = Path(__file__).parent.parent


def environment(device: str) -> dict[str, Any]:
    """Processor, accelerators, versions of packages, the revision of diffsparse; ready for JSON."""
    return {
        "device": device,
        "machine": {"processor": _processor()} | devices(),
        "versions": versions(),
        "git_revision": git_revision(),
    }


def versions() -> dict[str, str]:
    """The version of Python and of each package that matters here."""
    found = {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    return found | {package: version_of(package) for package in PACKAGES}


def version_of(package: str) -> str:
    """Of a package that may not be installed, or that another one brings, as triton-windows does triton."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        for other in importlib.metadata.packages_distributions().get(package, ()):
            return f"{importlib.metadata.version(other)} ({other})"
        return "not installed"


def devices() -> dict[str, str]:
    """The processor and the accelerators that torch sees."""
    import torch

    found = {"cpu": f"{os.cpu_count()} cores, of which torch uses {torch.get_num_threads()}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gibibytes = properties.total_memory / 2**30
        found[f"cuda:{index}"] = f"{properties.name}, {gibibytes:.0f} GiB, {architecture(index)}"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    other = torch.accelerator.current_accelerator(check_available=True)
    if other is not None and other.type not in ("cuda", "mps"):
        # Such as Intel's GPUs, "xpu", or Ascend's "npu".
        name_of = getattr(torch.get_device_module(other), "get_device_name", lambda index: "accelerator")
        for index in range(torch.accelerator.device_count()):
            found[f"{other.type}:{index}"] = name_of(index)
    return found


def architecture(index: int) -> str:
    """Of the GPU of this index: "sm_90", or "gfx942" of AMD."""
    import torch

    from diffsparse.kernels import amd

    properties = torch.cuda.get_device_properties(index)
    return amd.architecture(torch.device("cuda", index)) or f"sm_{properties.major}{properties.minor}"


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """What the numbers of a benchmark depend on: processor or GPU, threads, versions."""
    import torch

    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
    }


def git_revision() -> str | None:
    """The commit that this package is checked out at, with a + where files differ from it.

    None outside a checkout, as after `pip install`.
    """
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision = _git("rev-parse", "HEAD")
    return f"{revision}+" if _git("status", "--porcelain", "--", ".") else revision


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

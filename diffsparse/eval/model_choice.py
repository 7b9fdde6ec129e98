"""Which model a run uses: the embedded one, a folder with a pipeline, or a name on the hub."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsparse.eval.demo import MODEL
from diffsparse.eval.generate import SAMPLING_FILE, Sampling, load_pipeline, place

EMBEDDED = "demo"
"""The name of the embedded model, wherever it is installed."""

FINGERPRINTED_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelChoice:
    """A model and how it is called.

    Attributes:
        name: a folder, a name on the hub, or "demo", the embedded model.
        fingerprint: tells apart what stands in the folder now and later; None for the hub.
    """

    name: str
    sampling: Sampling
    fingerprint: str | None

    @property
    def folder(self) -> Path:
        """Where it is, if it is a folder."""
        return _folder(self.name)

    @property
    def knows_its_sampling(self) -> bool:
        """Whether a demo.json says how it is called."""
        return (self.folder / SAMPLING_FILE).is_file()

    def load(self, device: str, offload: bool = False) -> Any:
        """The pipeline on a device; with offload, only the part that computes.

        Folders with a demo.json load as the demo does. Others compute in bfloat16 on CUDA, in float32 elsewhere.

        Raises:
            ValueError: it cannot be loaded.
        """
        if self.knows_its_sampling:
            return load_pipeline(self.folder, device, offload)
        import diffusers
        import torch

        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(self.name, dtype=dtype)
        # A damaged file fails in as many ways as there are libraries that read it.
        except Exception as error:
            raise ValueError(f"--model {self.name} cannot be loaded ({type(error).__name__}: {error}).") from error
        pipe.set_progress_bar_config(disable=True)
        place(pipe, device, offload)
        return pipe


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, how it is called, and where it computes."""
    parser.add_argument(
        "--model",
        default=EMBEDDED,
        help="folder of a pipeline, or its name on the hub (default: demo, the embedded model)",
    )
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--size", metavar="WIDTHxHEIGHT", help="such as 1280x720 (default: the model's)")
    parser.add_argument("--frames", type=int, help="frames a video, 1 for images (default: the model's)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the best one here)")
    parser.add_argument("--offload", action="store_true", help="keep on the GPU only the part that computes")


def choose_model(name: str, size: str | None, frames: int | None, steps: int | None) -> ModelChoice:
    """The model of this name; size ("1280x720"), frames and steps where they are to differ from its demo.json.

    Raises:
        ValueError: no such folder, a number that makes no sense, or nothing that says how to call the model.
    """
    folder = _folder(name)
    for option, value in (("--frames", frames), ("--steps", steps)):
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}.")
    changes = {"num_frames": frames, "num_inference_steps": steps}
    given = {key: value for key, value in changes.items() if value is not None}
    given |= {} if size is None else read_size(size)
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or name.count("/") != 1):
        raise ValueError(
            f"--model {name} is no folder, and no name on the hub such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(f"--model {name} holds no pipeline: there is no model_index.json in it.")
    if (folder / SAMPLING_FILE).is_file():
        return ModelChoice(name, dataclasses.replace(Sampling.read(folder), **given), _fingerprint(folder))
    if size is None or frames is None or steps is None:
        raise ValueError(f"--model {name} has no {SAMPLING_FILE}: say --size, --frames and --steps.")
    return ModelChoice(name, Sampling(**given), _fingerprint(folder) if folder.is_dir() else None)


def read_size(size: str) -> dict[str, int]:
    """Width and height of a text such as 1280x720."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if match is None:
        raise ValueError(f"--size must be WIDTHxHEIGHT such as 1280x720, got {size}.")
    return {"width": int(match[1]), "height": int(match[2])}


def _folder(name: str) -> Path:
    return MODEL if name == EMBEDDED else Path(name)


def _fingerprint(folder: Path) -> str:
    """Of every file's name, size and beginning: weights of many gigabytes are not read to the end."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size} ".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(FINGERPRINTED_BYTES))
    return digest.hexdigest()

"""Making a video with a pipeline from a folder, step by timed step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import diffsparse
from diffsparse.eval.output_file import reading

SAMPLING_FILE = "demo.json"

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """How a model is called; of a folder's model, `demo.json` beside its model_index.json says it.

    Without a guidance scale or a longest prompt, the pipeline's own are used.
    """

    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float | None = None
    max_sequence_length: int | None = None
    fps: float = 16

    @property
    def largest_video_bytes(self) -> int:
        """What a video takes as PNGs if it is noise, which cannot be compressed."""
        return self.num_frames * self.height * self.width * 3

    @classmethod
    def read(cls, folder: Path, steps: int | None = None) -> Sampling:
        """Read it from the folder of a pipeline; `steps`, where given, are those of --steps.

        Raises:
            ValueError: the folder or the file is missing or damaged, with what is wrong; or no step.
        """
        if steps is not None and steps < 1:
            raise ValueError(f"--steps must be at least 1, got {steps}.")
        file = folder / SAMPLING_FILE
        for needed in (folder / "model_index.json", file):
            if not needed.is_file():
                raise ValueError(
                    f"The model is incomplete: {needed} is missing. Install diffsparse again, or name another model."
                )
        with reading(f"{file} is damaged", _WAY_OUT):
            values = json.loads(file.read_text(encoding="utf-8"))
            chosen = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        wrong = {name: value for name, value in chosen.items() if not _is_positive_number(value)}
        if wrong:
            raise ValueError(f"{file} is damaged: expected numbers above 0, got {wrong}. {_WAY_OUT}")
        return cls(**chosen | ({} if steps is None else {"num_inference_steps": steps}))


@dataclass(frozen=True, eq=False)
class Generation:
    """One video and the time it took.

    Attributes:
        frames: [F, H, W, 3] floats between 0 and 1.
        step_seconds: of each denoising step.
        total_seconds: of the whole call: text encoder, steps and VAE.
    """

    frames: NDArray[np.float32]
    step_seconds: tuple[float, ...]
    total_seconds: float

    @property
    def seconds_per_step(self) -> float:
        """Mean over all steps."""
        return sum(self.step_seconds) / len(self.step_seconds)

    @property
    def other_seconds(self) -> float:
        """What is not denoising: text encoder and VAE."""
        return self.total_seconds - sum(self.step_seconds)

    def times(self) -> dict[str, Any]:
        """All of these, ready for JSON."""
        names = ("total_seconds", "seconds_per_step", "other_seconds", "step_seconds")
        return {name: getattr(self, name) for name in names}


def check_seeds(option: str, seeds: Iterable[int]) -> None:
    """Raise ValueError unless torch takes the seeds; `option` is what names them on the command line."""
    for seed in seeds:
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"{option} must be between 0 and {LARGEST_SEED}, got {seed}.")


def choose_device(name: str | None) -> str:
    """The device of this name, or for None the best one here.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    # The best first.
    available = ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if torch.cuda.is_available():
        available = ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count())), *available]
    if name is not None and name not in available:
        raise ValueError(f"There is no device {name!r} here, only {', '.join(available)}.")
    return name or available[0]


def load_pipeline(folder: Path, device: str, offload: bool = False) -> Any:
    """The pipeline in a folder, quiet, on a device, as `place` puts it there; nothing is downloaded.

    It computes in float32; on CUDA its transformers compute in bfloat16.

    Raises:
        ValueError: it cannot be loaded.
    """
    import diffusers
    import torch
    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    # A damaged file fails in as many ways as there are libraries that read it.
    except Exception as error:
        raise ValueError(
            f"The model in {folder} cannot be loaded ({type(error).__name__}: {error}). {_WAY_OUT}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    pipe.to(torch.float32)
    if device.startswith("cuda"):
        for transformer in transformers_of(pipe):
            transformer.to(torch.bfloat16)
    place(pipe, device, offload)
    return pipe


def place(pipe: Any, device: str, offload: bool) -> None:
    """Put a pipeline on a device; with offload, only the part that computes."""
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)


@contextlib.contextmanager
def sparse_attention(pipe: Any, config: Any) -> Iterator[Callable[[], diffsparse.SparseAttentionReport]]:
    """Sparse attention on a pipeline, or on a transformer, inside the block; gives what reports what has run."""
    diffsparse.enable_sparse_attention(pipe, config)
    try:
        yield functools.partial(diffsparse.sparse_attention_report, pipe)
    finally:
        diffsparse.disable_sparse_attention(pipe)


def generate(
    pipe: Any, prompt: str, seed: int, sampling: Sampling, on_step: Callable[[], None] = lambda: None
) -> Generation:
    """Make the video of a prompt and a seed: the same noise on every device. `on_step` is called after each step.

    A pipeline of images makes a video of one frame.
    """
    import torch

    ticks: list[float] = []

    def tick(*_: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        ticks.append(time.perf_counter())

    def start(*_: Any) -> None:
        if not ticks:
            tick()

    def end_of_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tick()
        on_step()
        return tensors

    hooks = [transformer.register_forward_pre_hook(start) for transformer in transformers_of(pipe)]
    started = time.perf_counter()
    try:
        output = pipe(
            prompt,
            **_sizes(pipe, sampling),
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            callback_on_step_end=end_of_step,
        )
    finally:
        for hook in hooks:
            hook.remove()
    seconds = time.perf_counter() - started
    # [F, H, W, 3]
    frames = output.frames[0] if hasattr(output, "frames") else output.images[:1]
    return Generation(frames, tuple(np.diff(ticks).tolist()), seconds)


def transformers_of(pipe: Any) -> list[Any]:
    """The denoising transformers of a pipeline. Wan 2.2 has a second one, for the early steps."""
    components = pipe.components.items()
    return [component for name, component in components if name.startswith("transformer") and component is not None]


_WAY_OUT = "Install diffsparse again, or name another model."


def _sizes(pipe: Any, sampling: Sampling) -> dict[str, Any]:
    """What the pipeline is to be told of the sampling: pipelines of images know no frames."""
    known = inspect.signature(pipe.__call__).parameters
    values = {name: value for name, value in vars(sampling).items() if value is not None and name != "fps"}
    if sampling.num_frames == 1 and "num_frames" not in known:
        del values["num_frames"]
    return values


def _is_positive_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0

"""Making the videos of a run, as one of any number of processes that share its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffsparse
from diffsparse.eval.attention_seconds import AttentionSeconds
from diffsparse.eval.environment import environment
from diffsparse.eval.generate import Generation, generate
from diffsparse.eval.model_choice import ModelChoice
from diffsparse.eval.named_config import DENSE
from diffsparse.eval.peak_memory import PeakMemory
from diffsparse.eval.run_config import RunConfig
from diffsparse.eval.run_folder import Pair, RunFolder
from diffsparse.eval.run_progress import RunProgress


@dataclass(frozen=True)
class Job:
    """What a run is to make, and what this process makes it on.

    Attributes:
        protocol: the name of the one that the run follows.
        start: index of the pair to begin with, so that processes meet seldom.
    """

    model: ModelChoice
    prompts: list[str]
    seeds: list[int]
    configs: list[RunConfig]
    device: str
    offload: bool = False
    protocol: str | None = None
    start: int = 0

    @property
    def pairs(self) -> list[Pair]:
        """Every prompt with every seed."""
        pairs = [Pair(prompt, seed) for seed in self.seeds for prompt in range(len(self.prompts))]
        return pairs[self.start :] + pairs[: self.start]

    @property
    def all_configs(self) -> list[RunConfig]:
        """What videos are made by: first densely, with nothing on the pipeline."""
        return [RunConfig(DENSE, ()), *self.configs]

    @property
    def num_videos(self) -> int:
        """Of all pairs and configs."""
        return len(self.pairs) * len(self.all_configs)

    def num_missing(self, folder: RunFolder) -> int:
        """Of all these videos, how many the folder does not have yet."""
        return sum(folder.record(config.folder, pair) is None for pair in self.pairs for config in self.all_configs)


def make_videos(job: Job, folder: RunFolder, studio: Studio, progress: RunProgress) -> int:
    """Make every video that is not there or not as it was written; how many failed, each with its reason noted.

    The dense video of a pair and its sparse ones are made by one process, so that their times can be compared. Pairs
    that others hold come last: what they leave undone, because they died, is then done here.
    """
    taken = [pair for pair in job.pairs if not _make_pair(pair, job, folder, studio, progress, after_others=False)]
    for pair in taken:
        _make_pair(pair, job, folder, studio, progress, after_others=True)
    return job.num_missing(folder)


class Studio:
    """The pipeline, loaded when the first video is to be made."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._environment = environment(job.device)
        self._process = uuid.uuid4().hex
        self._pipe: Any = None
        self._warm: set[str] = set()

    def open(self) -> None:
        """Load the pipeline, and put each config on it once: one that it cannot have is found before hours of work.

        Raises:
            ValueError: the model cannot be loaded, or a config cannot be put on it.
        """
        if self._pipe is not None:
            return
        pipe = self._job.model.load(self._job.device, self._job.offload)
        for config in self._job.configs:
            try:
                with config.on(pipe, self._job.model.sampling.num_inference_steps):
                    pass
            # diffusers refuses in many ways.
            except Exception as error:
                raise ValueError(
                    f"--config {config.text} does not go with --model {self._job.model.name}: {error}"
                ) from error
        self._pipe = pipe

    def make(
        self, config: RunConfig, prompt: str, seed: int, on_step: Callable[[], None]
    ) -> tuple[Generation, dict[str, Any]]:
        """A video by a config, and its record. The studio is open.

        The first calls of a process are slower: memory is fetched, kernels are compiled. So the first video of each
        config follows after one step of each kind outside the timing.
        """
        sampling = self._job.model.sampling
        if config.folder not in self._warm:
            one_step = dataclasses.replace(sampling, num_inference_steps=1)
            # Dense steps that are quantized have kernels of their own.
            for dense_steps in (1.0, 0.0) if config.quantizes_dense_steps else (0.0,):
                with config.on(self._pipe, 1, dense_steps):
                    generate(self._pipe, prompt, seed, one_step)
            self._warm.add(config.folder)
        memory = PeakMemory(self._job.device)
        with config.on(self._pipe, sampling.num_inference_steps):
            with AttentionSeconds(self._pipe, self._job.device) as attention_seconds:
                made = generate(self._pipe, prompt, seed, sampling, on_step)
            attention = self._attention(config)
        return made, {
            "prompt": prompt,
            "seed": seed,
            "config": config.folder,
            "num_frames": len(made.frames),
            **made.times(),
            "attention_seconds": attention_seconds.total,
            "peak_memory_bytes": memory.num_bytes,
            "peak_memory_kind": memory.kind,
            "attention": attention,
            "environment": self._environment,
            "process": self._process,
        }

    def _attention(self, config: RunConfig) -> dict[str, Any] | None:
        if config.has_sparse_attention:
            return diffsparse.sparse_attention_report(self._pipe).as_dict()
        return {"density": None, "overall_density": None, "transformers": []} if config.parts else None


def _make_pair(
    pair: Pair, job: Job, folder: RunFolder, studio: Studio, progress: RunProgress, after_others: bool
) -> bool:
    """Whether this process had the pair to itself, and so made what was missing."""
    with folder.claim(pair, wait=after_others) as mine:
        if not mine:
            return False
        for config in job.all_configs:
            name = config.folder
            if folder.is_whole(name, pair) or (after_others and folder.failure(name, pair)):
                progress.skip(1)
                continue
            what = f"{config.text}, prompt {pair.prompt}, seed {pair.seed}"
            studio.open()
            progress.start(what)
            # Whatever goes wrong with one video, the rest may still be made.
            try:
                _check_room(job, folder)
                made, record = studio.make(config, job.prompts[pair.prompt], pair.seed, progress.step)
                folder.add(name, pair, made.frames, record)
                progress.end(what, f"{made.total_seconds:.1f} s")
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                progress.end(what, f"failed: {reason}")
                # A disk that takes no video may not take the reason either.
                with contextlib.suppress(OSError):
                    folder.remove(name, pair)
                    folder.note_failure(name, pair, reason)
    return True


def _check_room(job: Job, folder: RunFolder) -> None:
    """Find out before a video is made whether the disk can hold it: others write to it as well."""
    if (needed := job.model.sampling.largest_video_bytes) > (free := shutil.disk_usage(folder.path).free):
        raise OSError(f"the video may need {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free")

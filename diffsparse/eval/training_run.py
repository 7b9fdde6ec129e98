"""A training run's folder: atomic checkpoints, a loss log, and the time used so far, over interruptions too."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(eq=False)
class TrainingRun:
    """One stage of training in `folder`, allowed `seconds` and, if given, `steps` in all. Its loop is

    while (progress := run.progress()) < 1: ...; run.log(loss=...); run.maybe_save(state)
    """

    folder: Path
    stage: str
    seconds: float
    steps: int | None = None
    save_every: float = 60.0
    step: int = 0
    _used_before: float = 0.0
    _started: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)

    @property
    def checkpoint(self) -> Path:
        """The file that holds the stage's newest state."""
        return self.folder / f"{self.stage}.pt"

    def used(self) -> float:
        """Seconds this stage has run, interruptions not counted."""
        return self._used_before + time.monotonic() - self._started

    def progress(self) -> float:
        """Share of the stage's time or steps that is used, whichever is more, at most 1."""
        share_of_steps = self.step / self.steps if self.steps else 0.0
        return min(1.0, max(self.used() / max(self.seconds, 1e-9), share_of_steps))

    def resume(self) -> dict[str, Any] | None:
        """The state of an interrupted stage, with step and time set back to it; None for a fresh start."""
        if not self.checkpoint.exists():
            return None
        saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.step, self._used_before = saved["step"], saved["used"]
        self._started = time.monotonic()
        return saved["state"]

    def maybe_save(self, state: dict[str, Any]) -> None:
        """Save when the last save is `save_every` seconds old."""
        if time.monotonic() - self._saved >= self.save_every:
            self.save(state)

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint beside the old one, then replace it: a cut never leaves half a file."""
        save_atomically({"step": self.step, "used": self.used(), "state": state}, self.checkpoint)
        self._saved = time.monotonic()

    def log(self, **values: float | int | str) -> None:
        """Append one line to the run's `log.jsonl`."""
        line = {"stage": self.stage, "step": self.step, "seconds": round(self.used(), 1), **values}
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class WeightAverage:
    """The running mean of a model's weights over about its last `1 / (1 - decay)` steps."""

    def __init__(self, model: nn.Module, decay: float = 0.99) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` steps; the first steps, still near the random start, fade sooner."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            self.weights[name].lerp_(value, 1 - decay)


def save_atomically(value: object, path: Path) -> None:
    """torch.save that leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(value, part)
    os.replace(part, path)

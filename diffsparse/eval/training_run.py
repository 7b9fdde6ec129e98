"""A training run's folder: atomic checkpoints, a loss log, and the time used so far, over interruptions too."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from diffsparse.whole_file import whole_file


@dataclass(eq=False)
class TrainingRun:
    """One stage of training in `folder`, allowed `seconds` and, if given, `steps` in all. Its loop is

    while (progress := run.progress()) < 1: ...; run.log(loss=...); if run.save_is_due(): run.save(state)
    """

    folder: Path
    stage: str
    seconds: float
    steps: int | None = None
    save_every: float = 20.0
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

    def save_is_due(self) -> bool:
        """Whether the last save is `save_every` seconds old."""
        return time.monotonic() - self._saved >= self.save_every

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint, whole or not at all."""
        with whole_file(self.checkpoint) as unfinished:
            torch.save({"step": self.step, "used": self.used(), "state": state}, unfinished)
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
        # these share the model's memory: they follow it for as long as it stays on its device
        self._newest = model.state_dict()
        self.weights = {name: value.detach().clone() for name, value in self._newest.items()}

    def update(self, step: int) -> None:
        """Take in the weights after `step` steps; the first steps, still near the random start, fade sooner."""
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(list(self.weights.values()), list(self._newest.values()), step)

    def resume(self, weights: dict[str, Tensor]) -> None:
        """Go on from these weights, wherever they lie."""
        for name, value in self.weights.items():
            value.copy_(weights[name])

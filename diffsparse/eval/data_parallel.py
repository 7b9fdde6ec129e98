"""Training in several processes, each on its own clips, with averaged gradients.

On a busy CPU one thread each in two processes is far faster than two threads in one: they meet once a step instead
of once an operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Workers:
    """This process and how many train together; by default it trains alone."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, rank: int, count: int, meeting_file: Path) -> Workers:
        """Wait until `count` processes have joined through the same file."""
        dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=count)
        return cls(rank, count)

    @property
    def writes(self) -> bool:
        """Whether this process keeps the log and the checkpoints."""
        return self.rank == 0

    def generator(self, seed: int, step: int) -> torch.Generator:
        """A generator of its own for every step and worker: a resumed run goes on as it would have."""
        return torch.Generator().manual_seed((seed * 1_000_003 + step) * self.count + self.rank)

    def agree(self, value: float) -> float:
        """The first worker's value, so that all stop and change grids at the same step."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return float(shared)

    def average_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its mean over the workers."""
        if self.count == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, (flat / self.count).split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

"""Every key block of every head: dense attention by the block-sparse kernel, which computes it in 8 bits too."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.block_mask import BlockMask, num_blocks
from diffsparse.kernels.backends import BACKENDS
from diffsparse.kernels.block_sparse import pick_backend
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.strategy import AttentionCall

# The first that the fastest backend takes: large ones are faster, but for some GPUs' memory.
BLOCK_SIZES = (128, 64)


@dataclass(frozen=True)
class AllBlocks:
    """Lists all key blocks, so that nothing is skipped: for the dense calls of a config with `dense_quantization`.

    Args:
        backend, precision: what is to compute it, for the size of the blocks.
    """

    backend: str | None = None
    precision: str = "native"

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The same plan for every layer and step."""
        backends: dict[int, str] = {}
        for size in BLOCK_SIZES:
            with contextlib.suppress(ValueError):
                backends[size] = pick_backend(self.backend, query, size, size, self.precision).__name__
        fastest_first = list(BACKENDS.values())
        # What takes no size is said of where it is computed.
        size = min(backends, key=lambda size: fastest_first.index(backends[size]), default=BLOCK_SIZES[-1])
        return AttentionPlan(None, _all_of(query.shape[2], size, query.device), lasts=True)


@functools.lru_cache(maxsize=16)
def _all_of(num_tokens: int, block_size: int, device: torch.device) -> BlockMask:
    count = num_blocks(num_tokens, block_size)
    visible = torch.ones((1, 1, count, count), dtype=torch.bool, device=device)
    return BlockMask.from_visible(visible, num_tokens, block_size, block_size)

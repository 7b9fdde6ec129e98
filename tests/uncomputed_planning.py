"""Planning as on a GPU with its kernels, without a number: kernels are launched and not run, tensors hold nothing."""

from __future__ import annotations

import torch

from diffsparse import heads
from diffsparse.grid import TokenGrid
from diffsparse.kernels import pooling
from diffsparse.strategies import block_impacts, select_blocks

FLUX = TokenGrid(1, 64, 64, 512, 0), 24
WAN = TokenGrid(21, 45, 80), 40
HUNYUAN_VIDEO = TokenGrid(33, 45, 80, 0, 256), 24
"""Grid and number of heads; they have 128 numbers each."""


class Launches:
    """In place of all kernels of planning: counts how often they are launched."""

    def __init__(self, monkeypatch):
        from diffsparse.kernels import (
            block_impacts_triton,
            block_means_triton,
            block_sums_triton,
            mask_errors_triton,
            selection_triton,
        )

        self.count = 0
        monkeypatch.setattr(heads, "_kernels", lambda device: block_sums_triton)
        monkeypatch.setattr(heads, "_error_kernels", lambda device: mask_errors_triton)
        monkeypatch.setattr(pooling, "_means_kernels", lambda device: block_means_triton)
        monkeypatch.setattr(select_blocks, "_kernels", lambda device: selection_triton)
        monkeypatch.setattr(block_impacts, "_kernels", lambda device: block_impacts_triton)
        monkeypatch.setattr(block_sums_triton, "block_sums_kernel", self)
        monkeypatch.setattr(mask_errors_triton, "mask_errors_kernel", self)
        monkeypatch.setattr(block_means_triton, "block_means_kernel", self)
        monkeypatch.setattr(selection_triton, "select_kernel", self)
        monkeypatch.setattr(block_impacts_triton, "block_impacts_kernel", self)

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *args, **options):
        self.count += 1


def query_of(grid, num_heads):
    """[1, H, S, 128] bfloat16, as a projection leaves it."""
    return torch.empty(1, grid.num_tokens, num_heads, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)

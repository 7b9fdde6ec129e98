"""How many kernels a plan starts on a GPU: the CPU that starts them is what planning waits for."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from uncomputed_planning import FLUX, HUNYUAN_VIDEO, WAN, Launches, query_of

from diffsparse.strategies.adaptive import Adaptive
from diffsparse.strategies.strategy import AttentionCall

pytest.importorskip("triton")


class Operators(TorchDispatchMode):
    """How many operators ran that compute something. Most of them start one kernel."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        allocates = function.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty)
        if not function.is_view and function.overloadpacket != torch.ops.aten._unsafe_view and not allocates:
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", [FLUX, WAN, HUNYUAN_VIDEO])
def test_a_plan_starts_at_most_120_kernels_whatever_the_size(model, monkeypatch):
    grid, num_heads = model
    launches, query, call = Launches(monkeypatch), query_of(grid, num_heads), AttentionCall(grid, progress=0.0)
    # What depends on the grid alone is made once.
    Adaptive().plan(query, query, query, call)
    launches.count = 0
    with Operators() as operators:
        Adaptive().plan(query, query, query, call)
    assert operators.count + launches.count <= 120

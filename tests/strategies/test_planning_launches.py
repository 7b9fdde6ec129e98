"""How many kernels a plan starts on a GPU: the CPU that starts them is what planning waits for."""

from __future__ import annotations

import pytest
import torch
from triton_without_gpu import Operators
from uncomputed_planning import FLUX, HUNYUAN_VIDEO, WAN, Launches, query_of

from diffsparse.strategies import planning_memory
from diffsparse.strategies.adaptive import Adaptive
from diffsparse.strategies.strategy import AttentionCall

pytest.importorskip("triton")

COMPUTE_NOTHING = {"aten.empty", "aten.new_empty", "aten._unsafe_view"}


# Where text is padded, means and sizes of the keys that exist come on top.
@pytest.mark.parametrize(
    ("model", "length", "most"),
    [(FLUX, 0, 120), (WAN, 0, 120), (HUNYUAN_VIDEO, 0, 120), (HUNYUAN_VIDEO, 1, 154)],
)
def test_a_plan_starts_few_kernels_whatever_the_size(model, length, most, monkeypatch):
    grid, num_heads = model
    key_length = torch.empty(length, dtype=torch.int32, device="meta") if length else None
    call = AttentionCall(grid, progress=0.0, key_length=key_length)
    launches, query = Launches(monkeypatch), query_of(grid, num_heads)
    # What depends on the grid alone is made once.
    Adaptive().plan(query, query, query, call)
    launches.count = 0
    with Operators() as operators:
        Adaptive().plan(query, query, query, call)
    # Most operators start one kernel.
    computing = [name for name in operators.seen if name not in COMPUTE_NOTHING]
    assert len(computing) + launches.count <= most


def test_without_our_kernels_a_plan_of_wan_takes_at_most_2400_operators(monkeypatch):
    # With a GPU's memory for planning.
    monkeypatch.setattr(
        planning_memory, "PLANNING_BYTES", planning_memory.PLANNING_BYTES * planning_memory.TIMES_ON_GPU
    )
    query, call = query_of(*WAN), AttentionCall(WAN[0], progress=0.0)
    Adaptive().plan(query, query, query, call)
    with Operators() as operators:
        Adaptive().plan(query, query, query, call)
    assert sum(name not in COMPUTE_NOTHING for name in operators.seen) <= 2400

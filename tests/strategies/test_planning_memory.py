from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from uncomputed_planning import FLUX, HUNYUAN_VIDEO, WAN, Launches, query_of

from diffsparse.grid import TokenGrid
from diffsparse.strategies import adaptive_trials, planning_memory
from diffsparse.strategies.adaptive import Adaptive
from diffsparse.strategies.block_impacts import block_impacts
from diffsparse.strategies.planning_memory import blockwise_head_slices, head_slices, summed_head_slices
from diffsparse.strategies.strategy import AttentionCall


def test_slices_are_all_heads_in_their_order(monkeypatch):
    query = query_of(TokenGrid(1, 8, 8), 5)
    for bytes_of_all in (1, 1 << 20, 1 << 30):
        monkeypatch.setattr(planning_memory, "PLANNING_BYTES", bytes_of_all)
        for slices in (head_slices(query, 9), blockwise_head_slices(query, 9, 16), summed_head_slices(query, 9, 16)):
            assert [head for each in slices for head in range(5)[each]] == list(range(5))


@pytest.mark.parametrize(("device", "at_a_time"), [("cpu", 1), ("mps", 2), ("cuda", 10)])
def test_a_gpu_takes_more_heads_at_a_time_than_a_cpu(device, at_a_time):
    query = SimpleNamespace(shape=(1, 40, WAN[0].num_tokens, 128), device=torch.device(device))
    assert blockwise_head_slices(query, 64, 64)[0] == slice(0, at_a_time)


@pytest.mark.parametrize("model", [FLUX, WAN, HUNYUAN_VIDEO])
def test_where_kernels_judge_all_heads_of_a_model_are_judged_at_once(model):
    _, num_heads = model
    assert summed_head_slices(query_of(*model), 64, 64) == [slice(0, num_heads)]


def test_where_kernels_judge_too_many_heads_are_judged_a_few_at_a_time():
    grid, num_heads = HUNYUAN_VIDEO
    assert len(summed_head_slices(query_of(grid, 2 * num_heads), 64, 64)) == 2


def test_a_plan_on_a_gpu_without_a_kernel_is_made_in_the_slices_of_the_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(
        adaptive_trials, "blockwise_head_slices", lambda *args: asked.append(args) or blockwise_head_slices(*args)
    )
    grid, num_heads = FLUX
    query = query_of(grid, num_heads)
    Adaptive().plan(query, query, query, AttentionCall(grid))
    assert len(asked) == 3  # an order each


class Memory(TorchDispatchMode):
    """The most bytes that the tensors made held at a time, and that any of them did."""

    def __init__(self):
        super().__init__()
        self.most_bytes = 0
        self.largest = 0
        self.holders = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.largest = max(self.largest, storage.nbytes())
                self.holders.setdefault((storage._cdata, storage.nbytes()), []).append(weakref.ref(tensor))
        self.holders = {key: refs for key, refs in self.holders.items() if any(ref() is not None for ref in refs)}
        self.most_bytes = max(self.most_bytes, sum(num_bytes for _, num_bytes in self.holders))
        return result


def test_a_plan_on_a_cpu_makes_no_tensor_too_large_for_memory_that_is_there_already():
    grid = TokenGrid(16, 32, 32)
    query = torch.randn(1, 5, grid.num_tokens, 64)
    with Memory() as memory:
        Adaptive().plan(query, query, query, AttentionCall(grid))
    # The C library asks the system anew for whatever is as large.
    assert memory.largest < 32 << 20


@pytest.mark.parametrize("model", [FLUX, WAN, HUNYUAN_VIDEO])
def test_a_plan_on_a_gpu_takes_at_most_2_gib(model, monkeypatch):
    pytest.importorskip("triton")
    Launches(monkeypatch)
    grid, num_heads = model
    query, call = query_of(grid, num_heads), AttentionCall(grid, progress=0.0)
    Adaptive().plan(query, query, query, call)
    with Memory() as memory:
        Adaptive().plan(query, query, query, call)
    # Parts of the query, which was there before.
    assert memory.most_bytes - query.untyped_storage().nbytes() <= 2 << 30


def test_what_key_blocks_do_takes_as_much_without_a_kernel_however_many_queries_there_are():
    key = torch.empty(1, 1, 200_000, 128, device="meta")
    query = key[:, :, :1600]
    with Memory() as memory:
        block_impacts(query, query, key, key, 64, scale=0.1, tail=True)
    impacts = 4 * 1600 * 3125
    # Scores and sums; the impacts in parts, together and on their way; means of keys.
    most_bytes = planning_memory.PLANNING_BYTES + 3 * impacts + 8 * (200_000 // 64) * 128
    assert memory.most_bytes - key.untyped_storage().nbytes() <= most_bytes

from __future__ import annotations

import pytest
import torch
from peer_standins import install_flash_attn, install_flex_attention

from diffsparse.eval.random_attention import BLOCK_SIZE, error_of_sampled_rows, random_inputs, random_lists
from diffsparse.eval.sparse_peers import sparse_peers

CPU = torch.device("cpu")
INSTALL = {"flash-attn-4": install_flash_attn, "flex_attention": install_flex_attention}


@pytest.mark.parametrize("name", INSTALL)
@pytest.mark.parametrize("tokens", [512, 576], ids=["whole", "cut off"])
def test_peers_compute_what_the_lists_say(name, tokens, monkeypatch):
    torch.manual_seed(0)
    seen = INSTALL[name](monkeypatch)
    inputs = random_inputs(tokens, 2, 16, CPU)
    lists = {density: random_lists(tokens, 2, density, CPU) for density in (1.0, 0.5, 0.3)}
    said = []
    found = [peer for peer in sparse_peers(*inputs, lists, BLOCK_SIZE, said.append) if peer[0] == name]
    assert [density for _, density, _ in found] == list(lists)
    for _, density, call in found:
        assert error_of_sampled_rows(*inputs, *lists[density], call()) < 1e-6
    # One compilation for all densities.
    assert len({tuple(getattr(x, "shape", x) for x in listed if not callable(x)) for listed in map(tensors, seen)}) == 1


def tensors(listed):
    return listed if isinstance(listed, tuple) else listed.as_tuple()


def test_what_is_not_here_is_said_with_its_reason():
    lists = {1.0: random_lists(128, 2, 1.0, CPU)}
    said = []
    assert list(sparse_peers(*random_inputs(128, 2, 16, CPU), lists, BLOCK_SIZE, said.append)) == []
    first, second = said
    assert first.startswith("sparse flash-attn-4 cannot run: ModuleNotFoundError: No module named 'flash_attn'")
    assert second.startswith("sparse flex_attention cannot run: ValueError: on a CPU")

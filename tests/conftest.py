"""What holds for every test."""

import pytest
import torch

from diffsparse import speed_check

# Tensors are tiny here. On a busy machine two threads would wait for each other most of the time.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _new_memory_is_nan():
    """What `torch.empty` and its like give holds NaN, or the largest integer: no unwritten output passes."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _nothing_is_too_slow(monkeypatch):
    """What runs sparse does not depend on how busy the machine is."""
    monkeypatch.setattr(speed_check, "LEAST_SPEED_UP", 0.0)

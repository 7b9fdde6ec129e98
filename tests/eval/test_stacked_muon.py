from __future__ import annotations

import pytest
import torch

from diffsparse.eval.stacked_muon import StackedMuon, orthogonalized

SHAPES = [(16, 16), (8, 24), (16, 16), (24, 8), (8, 24)]
OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}


def test_steps_are_those_of_torch():
    """Both orthogonalize in bfloat16, so they may differ by its rounding, a few times over."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ours, theirs = ([value.clone().requires_grad_() for value in start] for _ in range(2))
    optimizers = StackedMuon(ours, **OPTIONS), torch.optim.Muon(theirs, **OPTIONS)
    for step in range(3):
        for own, other in zip(ours, theirs, strict=True):
            # a parameter that took no part in a step is left alone
            own.grad = None if step == 1 and own is ours[0] else torch.randn(own.shape, generator=generator)
            other.grad = own.grad
        for optimizer in optimizers:
            optimizer.step()
    for value, own, other in zip(start, ours, theirs, strict=True):
        moved = (other - value).norm()
        assert (own - other).norm() < 4 * torch.finfo(torch.bfloat16).eps * moved


def test_state_goes_on_from_that_of_torch():
    ours, theirs = (torch.ones(4, 6).requires_grad_() for _ in range(2))
    optimizers = StackedMuon([ours], **OPTIONS), torch.optim.Muon([theirs], **OPTIONS)
    theirs.grad = torch.eye(4, 6)
    optimizers[1].step()
    optimizers[0].load_state_dict(optimizers[1].state_dict())
    torch.testing.assert_close(
        optimizers[0].state[ours]["momentum_buffer"], optimizers[1].state[theirs]["momentum_buffer"]
    )


def test_another_rate_rule_is_refused():
    with pytest.raises(ValueError, match="match_rms_adamw"):
        StackedMuon([torch.ones(4, 6).requires_grad_()], lr=0.01)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 20), (2, 20, 6)])
def test_singular_values_end_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalized(matrices, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    values = torch.linalg.svdvals(result.float())
    # what the coefficients promise: within 0.3 of 1, but for values that started close to 0
    assert values.max() < 1.3
    assert values.median() > 0.7

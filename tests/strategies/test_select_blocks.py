from __future__ import annotations

import pytest
import torch
from plain_rules import highest

from diffsparse.strategies.select_blocks import select_blocks


def inputs(batch: int, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of which many are equal, none where a row is NaN or infinite; counts of three heads; always."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 4, (batch, heads, 6, 21), generator=generator).float()
    scores[:, :, 0] = torch.nan
    scores[:, :, 1, ::2] = -torch.nan
    scores[:, :, 2] = -torch.inf
    scores[:, :, 3] *= 0.0  # both zeros
    always = torch.rand((6, 21), generator=generator) < 0.2
    always[4], always[5] = True, False
    return scores, torch.tensor([0, 8, 50]), always


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_head_sees_what_always_is_and_the_highest_up_to_its_count(batch, heads):
    scores, counts, always = inputs(batch, heads)
    mask = select_blocks(scores, counts, always, 63, 11, 3)
    visible = mask.visible().expand(batch, 3, -1, -1)
    assert torch.equal(mask.counts, mask.visible().sum(-1))
    for b in range(batch):
        for head, count in enumerate((1, 8, 21)):
            for row in range(6):
                wanted = scores[b, head % heads, row].nan_to_num(torch.inf, torch.inf, -torch.inf).tolist()
                assert visible[b, head, row].tolist() == highest(wanted, count, always[row].tolist())


def test_the_inputs_are_left_as_they_were():
    given = inputs(1, 3)
    before = [x.clone() for x in given]
    select_blocks(*given, 63, 11, 3)
    for x, was in zip(given, before):
        torch.testing.assert_close(x, was, rtol=0, atol=0, equal_nan=True)

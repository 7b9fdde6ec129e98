from __future__ import annotations

import torch
from plain_rules import highest

from diffsparse.strategies.top_blocks import top_blocks


def test_the_highest_are_kept_with_those_that_always_are():
    scores = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    always = torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) < 0.3
    for count in (1, 3, 20):
        kept = top_blocks(scores, count, always)
        for head in range(2):
            for row in range(4):
                assert kept[head, row].tolist() == highest(scores[head, row].tolist(), count, always[row].tolist())


def test_without_any_that_are_kept_always_a_row_keeps_just_the_count():
    scores = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    assert top_blocks(scores, 4).sum(-1).tolist() == [4, 4, 4]


def test_each_row_may_have_a_count_of_its_own():
    scores = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    always = torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) < 0.3
    counts = torch.tensor([[0, 3, 5, 20], [1, 2, 9, 4]])
    kept = top_blocks(scores, counts[..., None], always)
    for head in range(2):
        for row, count in enumerate(counts[head].tolist()):
            assert kept[head, row].tolist() == highest(scores[head, row].tolist(), count, always[row].tolist())

from __future__ import annotations

import torch

from diffsparse.strategies.pooled_scores import pooled_scores


def test_scores_are_those_of_the_means_of_the_tokens_that_exist():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 21, 6, generator=generator) for _ in range(2))
    length = torch.tensor([13, 21])
    key[0, :, 13:] = torch.nan
    scores = pooled_scores(query, key, 8, 4, key_length=length, scale=0.5)
    for element, existing in enumerate(length.tolist()):
        for q, queries in enumerate(query[element].split(8, dim=1)):
            for k, keys in enumerate(key[element, :, :existing].split(4, dim=1)):
                wanted = 0.5 * (queries.mean(1) * keys.mean(1)).sum(-1)
                assert torch.allclose(scores[element, :, q, k], wanted, atol=1e-6)
    assert (scores[0, :, :, 4:] == -torch.inf).all()


def test_the_scale_is_that_of_attention():
    query, key = (torch.randn(1, 1, 8, 16, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert torch.equal(pooled_scores(query, key, 4, 4), pooled_scores(query, key, 4, 4, scale=0.25))

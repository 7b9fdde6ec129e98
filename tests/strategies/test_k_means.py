from __future__ import annotations

import pytest
import torch

from diffsparse.strategies import planning_memory
from diffsparse.strategies.k_means import k_means, reduce_clusters


def test_centroids_move_to_the_means_of_their_tokens():
    """Against token-by-token k-means, with a cluster that no token is near to."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 31, 5, generator=generator)
    start = torch.cat([x[:, :4], torch.full((2, 1, 5), 100.0)], dim=1)
    labels, centroids, sizes = k_means(x, start, 3)
    for head in range(2):
        centres = [centre.clone() for centre in start[head]]
        for _ in range(3):
            near = [min(range(5), key=lambda c: float((token - centres[c]).norm())) for token in x[head]]
            for c in set(near):
                centres[c] = torch.stack([token for token, n in zip(x[head], near) if n == c]).mean(0)
        near = [min(range(5), key=lambda c: float((token - centres[c]).norm())) for token in x[head]]
        assert labels[head].tolist() == near
        assert sizes[head].tolist() == [near.count(c) for c in range(5)]
        assert torch.allclose(centroids[head], torch.stack(centres), atol=1e-5)


def test_groups_far_apart_are_found():
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(0, 4, (60,), generator=generator)
    x = (10 * torch.eye(4)[group] + 0.1 * torch.randn(60, 4, generator=generator))[None]
    start = torch.stack([x[0, group == g][0] for g in range(4)])[None]
    labels, _, _ = k_means(x, start, 2)
    assert torch.equal(labels[0], group)


def test_a_few_tokens_at_a_time_give_the_same_clusters(monkeypatch):
    x = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0))
    together = k_means(x, x[:, :7], 4)
    monkeypatch.setattr(planning_memory, "PLANNING_BYTES", 1)
    for one, other in zip(together, k_means(x, x[:, :7], 4)):
        assert torch.allclose(one, other, atol=1e-6)


class OnMPS(torch.Tensor):
    """Has no kernel for sums of segments, as tensors on Apple's GPUs."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.segment_reduce:
            raise NotImplementedError("'aten::segment_reduce' is not currently implemented for the MPS device")
        return super().__torch_function__(function, types, args, kwargs)

    def cpu(self):
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("what", ["sum", "min", "max"])
def test_clusters_are_reduced_on_the_cpu_where_their_device_cannot(what):
    x, sizes = torch.randn(2, 9, 3), torch.tensor([[2, 0, 7], [3, 3, 3]])
    reduced = reduce_clusters(x.as_subclass(OnMPS), what, sizes.as_subclass(OnMPS))
    for head, of_head in enumerate(sizes.tolist()):
        for cluster, tokens in zip(reduced[head], x[head].split(of_head)):
            # Of no token nothing is asked.
            if len(tokens):
                expected = {"sum": torch.sum, "min": torch.amin, "max": torch.amax}[what](tokens, 0)
                assert torch.allclose(cluster, expected)

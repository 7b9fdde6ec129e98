"""K-means of the tokens of each head."""

from __future__ import annotations

import torch
from torch import Tensor

from diffsparse.strategies.planning_memory import slices


def k_means(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters of the tokens of x [H, S, F] float32, by Euclidean distance, each head for itself.

    Starts from `centroids` [H, C, F] and moves them a fixed number of times, without waiting for them to settle. A
    cluster that loses all its tokens stays where it is. Sums are made in a fixed order, so that the same tokens give
    the same clusters.

    Returns:
        The label of each token [H, S] int64, by the centroids as they are in the end; the centroids [H, C, F]; how
        many tokens each cluster has [H, C] int64.
    """
    for _ in range(iterations):
        centroids, _ = cluster_means(x, nearest(x, centroids), centroids)
    labels = nearest(x, centroids)
    return labels, centroids, cluster_sizes(labels, centroids.shape[1])


def cluster_means(x: Tensor, labels: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the tokens of x [H, S, F] that carry each label [H, S], and how many these are, [H, C] int64.

    Where no token does, it is the one `before` [H, C, F]. Sums are made in a fixed order.
    """
    sizes = cluster_sizes(labels, before.shape[1])
    sums = reduce_clusters(by_label(x, labels), "sum", sizes)
    return torch.where(sizes[..., None] > 0, sums / sizes.clamp(min=1)[..., None], before), sizes


def by_label(x: Tensor, labels: Tensor) -> Tensor:
    """The tokens of x [H, S, F] sorted by their labels [H, S], those of a label in the order that they had."""
    order = torch.argsort(labels, dim=-1, stable=True)
    return x.gather(1, order[..., None].expand_as(x))


def reduce_clusters(by_cluster: Tensor, what: str, sizes: Tensor) -> Tensor:
    """The sum, "min" or "max" of the tokens of each cluster, [H, C, F], of tokens [H, S, F] that `by_label` has sorted.

    On the CPU where torch has no kernel for it, as on Apple's GPUs. `sizes` [H, C] int64.
    """
    try:
        return torch.segment_reduce(by_cluster, what, lengths=sizes, axis=1, unsafe=True)
    except NotImplementedError:
        reduced = torch.segment_reduce(by_cluster.cpu(), what, lengths=sizes.cpu(), axis=1, unsafe=True)
        return reduced.to(by_cluster.device)


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The index of the centroid [H, C, F] nearest to each token of x [H, S, F]: [H, S] int64."""
    heads, tokens, _ = x.shape
    # The token's own square is the same for all centroids.
    half_squares = centroids.square().sum(-1)[:, None] / 2
    labels = torch.empty((heads, tokens), dtype=torch.long, device=x.device)
    for part in slices(tokens, 8 * heads * centroids.shape[1]):
        labels[:, part] = torch.argmin(half_squares - x[:, part] @ centroids.transpose(-1, -2), dim=-1)
    return labels


def cluster_sizes(labels: Tensor, clusters: int) -> Tensor:
    """How many tokens carry each label, [H, C] int64."""
    sizes = labels.new_zeros((labels.shape[0], clusters))
    return sizes.scatter_add_(1, labels, torch.ones_like(labels))

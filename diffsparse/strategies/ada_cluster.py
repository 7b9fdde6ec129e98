"""AdaCluster (arXiv:2604.18348): queries sorted by direction, keys by clusters found in stages, chosen by bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.clustered_tokens import (
    Clusters,
    first_tokens,
    most_clusters,
    plan_by_clusters,
    video_tokens,
)
from diffsparse.strategies.k_means import by_label, cluster_means, cluster_sizes, nearest, reduce_clusters
from diffsparse.strategies.option_checks import check_block_sizes, check_density, check_integers, check_number
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.top_blocks import top_blocks


@dataclass(frozen=True)
class AdaCluster:
    """Each query block sees as many key blocks, those whose clusters could score highest with its queries' directions.

    Queries form clusters by k-means of their directions: which keys a query scores highest with does not depend on its
    length. Keys form clusters in stages, by Euclidean distance: those farther from their centroid than `threshold`
    times the mean distance of the first stage are taken out, and form clusters among themselves in the next. So a head
    has as many clusters as its keys need; one with keys that are as far off after the last stage sees everything.

    The score of a cluster of keys is the highest that any key within its bounds could have with the centroid of the
    queries: the largest of its keys in each dimension where that is positive, the smallest where it is negative, which
    is two products of matrices (TensorQuest). The method takes a number of clusters for each cluster of queries. Our
    unit is the block: a pair of blocks has the mean score of its pairs of tokens, by the clusters that these belong to,
    and each query block takes a share of the blocks.

    The method decides for whole layers which see everything, so that about 15 % do; here a head decides for itself, and
    `SparseAttentionConfig(dense_layers=...)` names layers. It finds the number of clusters at the first step, and
    begins later ones with the centroids before. Plans here know nothing of one another, so each begins with tokens
    spread over the video. A batch shares its clusters, of tokens alike in all its elements, and each element has a
    choice of blocks of its own.

    The released code (github.com/USTC-MLSys-Team/Adacluster) differs. It clusters queries as they are, by distance. Its
    thresholds are numbers, at first 5.5 (Wan) and 3 (CogVideoX) for keys, and grow by a tenth or more from stage to
    stage; one decision for all heads says how many clusters a layer has, and k-means of all tokens makes as many. For
    HunyuanVideo the layers that see everything are listed, the others have 250 clusters of queries and 1243 of keys. In
    place of bounds it takes the positive and the negative numbers of a cluster's mean key, on Wan the softmax of the
    centroids. It keeps 128 (Wan), 94 (HunyuanVideo) or 64 (CogVideoX) clusters. That a stage may add as many clusters
    as the first, 200 for Wan, is from there; the paper says fewer.

    Args:
        density: share of the key blocks that a query block sees, 0–1, rounded up to a whole block; heads that see
            everything come on top.
        query_clusters, key_clusters: at most, of keys in each stage; no more than there are blocks of video.
        stages: of clusters of keys.
        threshold: how far from its centroid a key may be, in mean distances.
        iterations: moves of the centroids, in each stage.
        query_block_size, key_block_size: tokens a block.
        seed: of the tokens to begin with.

    Raises:
        ValueError: an option out of its range.
    """

    density: float = 0.25
    query_clusters: int = 65
    key_clusters: int = 200
    stages: int = 5
    threshold: float = 1.5
    iterations: int = 3
    query_block_size: int = 64
    key_block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        check_integers(1, query_clusters=self.query_clusters, key_clusters=self.key_clusters, stages=self.stages)
        check_number("threshold", self.threshold, 0, math.inf)
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)
        check_integers(0, iterations=self.iterations, seed=self.seed)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        grid = call.grid
        sizes = self.query_block_size, self.key_block_size
        query_clusters = most_clusters(self.query_clusters, grid, self.query_block_size)

        def choose(heads: slice, always: Tensor) -> tuple[Tensor, Clusters, Clusters]:
            directions = F.normalize(query[:, heads].float(), dim=-1)
            queries = Clusters.of_video(directions, grid, query_clusters, self.iterations, self.seed)
            keys, bounds, is_scattered = self._key_clusters(key[:, heads], grid)
            scores = highest_scores(queries.centroids, *bounds)
            by_block = queries.shares_of_blocks(grid.num_tokens, self.query_block_size) @ scores
            by_block = by_block @ keys.shares_of_blocks(grid.num_tokens, self.key_block_size).transpose(-1, -2)
            visible = top_blocks(by_block, math.ceil(self.density * by_block.shape[-1]), always)
            return visible | is_scattered[:, None, None], queries, keys

        # The tokens of one side a few times more: as directions, with their centroids and the difference of both.
        return plan_by_clusters(query, grid, *sizes, choose, bytes_a_token=8 * query.shape[-1])

    def _key_clusters(self, key: Tensor, grid: TokenGrid) -> tuple[Clusters, tuple[Tensor, Tensor], Tensor]:
        """Clusters of the keys of some heads [B, H, S, D], their bounds [B, H, C, D], and which heads have none [H]."""
        batch, heads, _, dim = key.shape
        features = video_tokens(key, grid).permute(1, 2, 0, 3).flatten(2)  # [H, video tokens, B * D]
        count = most_clusters(self.key_clusters, grid, self.key_block_size)
        start = first_tokens(grid, count, self.seed, key.device)
        labels, centroids, is_far = clusters_by_stages(features, start, self.stages, self.threshold, self.iterations)
        sizes = cluster_sizes(labels, centroids.shape[1])
        centroids, least, most = (
            x.view(heads, -1, batch, dim).permute(2, 0, 1, 3)
            for x in (centroids, *cluster_bounds(features, labels, sizes))
        )
        return Clusters(labels, centroids, sizes), (least, most), is_far.any(-1)


def clusters_by_stages(
    x: Tensor, start: Tensor, stages: int, threshold: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters of the tokens of x [H, S, F] float32, by k-means, and of those far from their centroid once more.

    A token is far where its distance is more than `threshold` times the mean of the first stage's, in its head, and
    more than rounding.

    Args:
        start: the tokens that the first stage begins with, [C] int64; a later one begins with those at the same
            places among the tokens that it is about, and leaves clusters empty where these are fewer.
        stages: at most. Later ones find nothing to do where no token is far.

    Returns:
        The label of each token [H, S] int64, from 0 to stages * C; the centroid of each label, [H, stages * C, F];
        which tokens are far in the end, [H, S] bool, whose labels are of the last stage.
    """
    heads, tokens, dim = x.shape
    count = len(start)
    labels = torch.zeros((heads, tokens), dtype=torch.long, device=x.device)
    is_far = torch.ones_like(labels, dtype=torch.bool)
    most = x.new_zeros((heads, 1))
    of_stages = []
    for stage in range(stages):
        far_first = torch.argsort((~is_far).byte(), dim=-1, stable=True)
        begin = far_first.gather(1, start * is_far.sum(-1, keepdim=True) // tokens)  # [H, C]
        centroids = x.gather(1, begin[..., None].expand(-1, -1, dim))
        for _ in range(iterations):
            # All others are a cluster of their own, which is left out.
            near = nearest(x, centroids).masked_fill(~is_far, count)
            centroids = cluster_means(x, near, F.pad(centroids, (0, 0, 0, 1)))[0][:, :-1]
        near = nearest(x, centroids)
        distance = (x - centroids.gather(1, near[..., None].expand_as(x))).norm(dim=-1)  # [H, S]
        if stage == 0:
            # Tokens that differ by rounding are not far from one another, whatever the mean.
            rounding = 1e-4 * x.norm(dim=-1).mean(-1, keepdim=True)
            most = torch.maximum(threshold * distance.mean(-1, keepdim=True), rounding)
        labels = torch.where(is_far, near + stage * count, labels)
        is_far &= distance > most
        of_stages.append(centroids)
    return labels, torch.cat(of_stages, dim=1), is_far


def cluster_bounds(x: Tensor, labels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest of the tokens of x [H, S, F] in each cluster and dimension, [H, C, F] each.

    Labels [H, S], of which there are `sizes` [H, C]. An empty cluster has 0.
    """
    by_cluster = by_label(x, labels)
    least, most = (reduce_clusters(by_cluster, which, sizes) for which in ("min", "max"))
    is_empty = sizes[..., None] == 0
    return least.masked_fill(is_empty, 0.0), most.masked_fill(is_empty, 0.0)


def highest_scores(query: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """The highest score of each query [B, H, R, D] with any key from `least` to `most` [B, H, C, D]: [B, H, R, C]."""
    return query.clamp(min=0) @ most.transpose(-1, -2) + query.clamp(max=0) @ least.transpose(-1, -2)

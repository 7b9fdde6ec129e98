"""SVOO (arXiv:2603.18636): queries and keys clustered by each other, and as many blocks as each head needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_attention import scores_of_rows
from diffsparse.strategies.clustered_tokens import (
    Clusters,
    block_mass,
    first_tokens,
    most_clusters,
    plan_by_clusters,
    video_tokens,
)
from diffsparse.strategies.fixed_masks import sampled_rows
from diffsparse.strategies.k_means import cluster_means
from diffsparse.strategies.option_checks import check_block_sizes, check_integers, check_sampling, check_shares
from diffsparse.strategies.planning_memory import slices
from diffsparse.strategies.smallest_set import smallest_set
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.top_blocks import top_blocks


@dataclass(frozen=True)
class SVOO:
    """As `SVG2`, with tokens clustered by what they attend to, and a least number of blocks for each head.

    A key's profile is the direction of its scores with the centroids of the queries, a query's that of its scores with
    the centroids of the keys. In each iteration every key goes to the cluster whose centroid has the profile nearest to
    its own, centroids become means, and queries follow in the same way.

    Each query block then sees the fewest key blocks that reach `mass` by the centroids, and at least the share of keys
    that a query of the head needs for `covered` of its attention, taken as `least` or `most` where it is beyond them.
    The method measures that share beforehand, for each step, layer and head on a few prompts, and keeps the highest;
    here a plan measures it itself, on sampled queries. `least` and `most` are those released for Wan 2.1
    (github.com/Mutual-Luo/SVOO); the same authors' SparseVideo has 0.05 and 0.1.

    The unit is the block, as in `SVG2`. The released code begins with tokens drawn at random, this with tokens spread
    over the video. A batch shares its clusters, by the profiles of all its elements.

    Args:
        query_clusters, key_clusters: at most; no more than there are blocks of video.
        mass: share of the softmax that the key blocks of a query block must reach, 0–1.
        covered: share of its attention that a query needs, 0–1.
        least, most: share of the key blocks that a query block sees at least, 0–1.
        iterations: moves of the centroids.
        sampled_rows: how many queries of a head are looked at for what they need.
        query_block_size, key_block_size: tokens a block.
        seed: of the tokens to begin with, and of the sampled queries.

    Raises:
        ValueError: an option out of its range, or `least` above `most`.
    """

    query_clusters: int = 256
    key_clusters: int = 1024
    mass: float = 0.9
    covered: float = 0.95
    least: float = 0.15
    most: float = 0.2
    iterations: int = 2
    sampled_rows: int = 64
    query_block_size: int = 64
    key_block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(1, query_clusters=self.query_clusters, key_clusters=self.key_clusters)
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)
        check_integers(1, iterations=self.iterations)
        check_shares(mass=self.mass, covered=self.covered, least=self.least, most=self.most)
        check_sampling(self.sampled_rows, self.seed)
        if self.least > self.most:
            raise ValueError(f"`least` must be at most `most`, got {self.least!r} and {self.most!r}.")

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        grid = call.grid
        scale = call.scale_of(query)
        sizes = self.query_block_size, self.key_block_size
        counts = [
            most_clusters(wanted, grid, size) for wanted, size in zip((self.query_clusters, self.key_clusters), sizes)
        ]
        rows = sampled_rows(grid, self.sampled_rows, self.seed, query.device)

        def choose(heads: slice, always: Tensor) -> tuple[Tensor, Clusters, Clusters]:
            queries, keys = self._clusters(query[:, heads], key[:, heads], grid, counts)
            mass = block_mass(queries, keys, scale, grid.num_tokens, *sizes)
            sampled = query[:, heads].index_select(2, rows).float() * scale
            share = needed_share(sampled, key[:, heads], self.covered, call.key_length).clamp(self.least, self.most)
            least = (share * mass.shape[-1]).long().clamp(min=1)[:, None, None]  # [H, 1, 1]
            return smallest_set(mass, self.mass, always) | top_blocks(mass, least, always), queries, keys

        return plan_by_clusters(query, grid, *sizes, choose, bytes_a_token=8 * max(*counts, self.sampled_rows))

    def _clusters(self, query: Tensor, key: Tensor, grid: TokenGrid, counts: list[int]) -> tuple[Clusters, Clusters]:
        """Clusters of the queries and of the keys of some heads [B, H, S, D]."""
        tokens = [video_tokens(x, grid) for x in (query, key)]
        query_centroids, key_centroids = (
            x.index_select(2, first_tokens(grid, count, self.seed, x.device)) for x, count in zip(tokens, counts)
        )
        for _ in range(self.iterations):
            key_labels = nearest_profile(tokens[1], key_centroids, query_centroids)
            key_centroids, key_sizes = _means(tokens[1], key_labels, key_centroids)
            query_labels = nearest_profile(tokens[0], query_centroids, key_centroids)
            query_centroids, query_sizes = _means(tokens[0], query_labels, query_centroids)
        return Clusters(query_labels, query_centroids, query_sizes), Clusters(key_labels, key_centroids, key_sizes)


def nearest_profile(x: Tensor, centroids: Tensor, others: Tensor) -> Tensor:
    """Which of the centroids [B, H, C, D] scores most alike with the `others` [B, H, O, D] as each token does.

    Tokens x [B, H, S, D]; the result is [H, S] int64. Profiles of all elements of a batch are one.
    """
    batch, heads, tokens, _ = x.shape

    def profile(of: Tensor) -> Tensor:
        return F.normalize((of @ others.transpose(-1, -2)).permute(1, 2, 0, 3).flatten(2), dim=-1)  # [H, n, B * O]

    centres = profile(centroids).transpose(-1, -2)
    labels = torch.empty((heads, tokens), dtype=torch.long, device=x.device)
    for part in slices(tokens, 8 * heads * (batch * others.shape[2] + centroids.shape[2])):
        labels[:, part] = torch.argmax(profile(x[:, :, part]) @ centres, dim=-1)
    return labels


def needed_share(query: Tensor, key: Tensor, covered: float, key_length: Tensor | None = None) -> Tensor:
    """The share of the keys that queries need for `covered` of their attention, mean over the queries: [H] float32.

    Scaled queries [B, H, R, D], keys [B, H, S, D], of which those at or beyond `key_length` [B] do not exist.
    """
    held = scores_of_rows(query, key, key_length).softmax(-1).sort(dim=-1, descending=True).values.cumsum(-1)
    # One key more than those that do not reach it.
    needed = (held < covered * held[..., -1:]).sum(-1) + 1
    return needed.float().mean((0, 2)) / key.shape[2]


def _means(x: Tensor, labels: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Means [B, H, C, D] of the tokens x [B, H, S, D] of each label, or those `before`; how many they are, [H, C]."""
    batch, heads, _, dim = x.shape
    by_head = x.permute(1, 2, 0, 3).flatten(2)
    means, sizes = cluster_means(by_head, labels, before.permute(1, 2, 0, 3).flatten(2))
    return means.view(heads, -1, batch, dim).permute(2, 0, 1, 3), sizes

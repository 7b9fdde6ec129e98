"""SVG-EAR (arXiv:2603.08982): clusters as in SVG2, and exactly what their means would represent worst."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.kernels.pooling import block_means
from diffsparse.kernels.reorder import gather_tokens
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_attention import by_block, scores_of_rows
from diffsparse.strategies.clustered_tokens import Clusters, block_mass, most_clusters, plan_by_clusters
from diffsparse.strategies.option_checks import check_block_sizes, check_bools, check_integers, check_shares
from diffsparse.strategies.smallest_set import smallest_set
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.top_blocks import top_blocks


@dataclass(frozen=True)
class SVGEAR:
    """Queries and keys are sorted as by `SVG2`; each query block sees the key blocks whose means would err most.

    How many is what `SVG2` would keep: the fewest blocks that hold `mass`, twice `least` at least. Those with the most
    mass are seen in any case, a share `least` of all. The others follow by their error, which for a query's centroid is
    the sum over a block's keys of the square of weight × value less the weight of the block's mean key × its mean
    value. What is not seen enters as the mean of its block.

    As of `SVG2` the method's own unit is the cluster, and here the block: so its means are of blocks, and errors are
    those of blocks of keys, averaged over the queries of a block of queries by the clusters that these belong to. The
    paper's ratio of error to cost is the error then, since blocks cost the same. For the average, errors of a centroid
    are taken over the square of the sum of its weights. The rule, `mass` and `least` are those of the code released
    with SVOO (github.com/Mutual-Luo/SVOO, `README_EAR.md`); how many clusters and iterations, those of `SVG2`.

    Args:
        query_clusters, key_clusters: at most; no more than there are blocks of video.
        mass: share of the softmax that as many key blocks of a query block would hold, 0–1.
        least: share of the key blocks that a query block sees for their mass, 0–1.
        iterations: moves of the centroids.
        tail: whether what is not seen enters as the mean of its block.
        query_block_size, key_block_size: tokens a block.
        seed: of the tokens to begin with.

    Raises:
        ValueError: an option out of its range.
    """

    query_clusters: int = 300
    key_clusters: int = 1000
    mass: float = 0.9
    least: float = 0.1
    iterations: int = 10
    tail: bool = True
    query_block_size: int = 64
    key_block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(1, query_clusters=self.query_clusters, key_clusters=self.key_clusters)
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)
        check_shares(mass=self.mass, least=self.least)
        check_integers(0, iterations=self.iterations, seed=self.seed)
        check_bools(tail=self.tail)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        grid = call.grid
        scale = call.scale_of(query)
        sizes = self.query_block_size, self.key_block_size
        counts = [
            most_clusters(wanted, grid, size) for wanted, size in zip((self.query_clusters, self.key_clusters), sizes)
        ]

        def choose(heads: slice, always: Tensor) -> tuple[Tensor, Clusters, Clusters]:
            queries, keys = (
                Clusters.of_video(x[:, heads], grid, count, self.iterations, self.seed)
                for x, count in zip((query, key), counts)
            )
            mass = block_mass(queries, keys, scale, grid.num_tokens, *sizes)
            by_mass, twice = (max(1, int(share * mass.shape[-1])) for share in (self.least, 2 * self.least))
            budget = smallest_set(mass, self.mass, always).sum(-1, keepdim=True).clamp(min=twice)
            order = keys.order(grid)
            errors = errors_of_means(
                queries.centroids * scale,
                gather_tokens(key[:, heads], order),
                gather_tokens(value[:, heads], order),
                self.key_block_size,
                call.key_length,
            )
            by_block = queries.shares_of_blocks(grid.num_tokens, self.query_block_size) @ errors
            return top_blocks(by_block, budget, top_blocks(mass, by_mass, always)), queries, keys

        # The weights of all centroids, and two products of them.
        plan = plan_by_clusters(query, grid, *sizes, choose, bytes_a_token=12 * counts[0])
        tail = torch.ones(1, 1, dtype=torch.bool, device=query.device) if self.tail else None
        return dataclasses.replace(plan, tail=tail)


def errors_of_means(
    query: Tensor, key: Tensor, value: Tensor, block_size: int, key_length: Tensor | None = None
) -> Tensor:
    """What it does to a query's output that a block's keys and values are taken for their means, [B, H, R, K] float32.

    The squared lengths of (weight × value − weight of the mean key × mean value), summed over the keys of a block,
    where weights are those of the query's whole softmax.

    Args:
        query: [B, H, R, D] float32, scaled.
        key, value: [B, H, S, D]. Those at or beyond `key_length` [B] do not exist.
    """
    key, value = key.float(), value.float()
    mean_key, tokens = block_means(key, block_size, key_length)
    mean_value, _ = block_means(value, block_size, key_length)
    logits = scores_of_rows(query, key, key_length)
    if key_length is not None:
        beyond = torch.arange(key.shape[2], device=key.device) >= key_length[:, None]
        value = value.masked_fill(beyond[:, None, :, None], 0.0)
    total = logits.logsumexp(-1, keepdim=True)
    weights = (logits - total).exp()
    mean_weight = (query @ mean_key.transpose(-1, -2) - total).exp()  # [B, H, R, K]
    value_of_mean = mean_value.repeat_interleave(block_size, dim=2)[:, :, : value.shape[2]]
    squares = by_block(weights.square() * value.square().sum(-1)[:, :, None], block_size)
    crossed = by_block(weights * (value * value_of_mean).sum(-1)[:, :, None], block_size)
    squared_mean = tokens[:, None] * mean_value.square().sum(-1)  # [B, H, K]
    return (squares - 2 * mean_weight * crossed + mean_weight.square() * squared_mean[:, :, None]).clamp(min=0)

"""Sparse VideoGen 2 (arXiv:2505.18875): tokens sorted by what they hold, clusters chosen by their centroids."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffsparse.plan import AttentionPlan
from diffsparse.strategies.clustered_tokens import Clusters, block_mass, most_clusters, plan_by_clusters
from diffsparse.strategies.option_checks import check_block_sizes, check_integers, check_shares
from diffsparse.strategies.smallest_set import smallest_set
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.top_blocks import top_blocks


@dataclass(frozen=True)
class SVG2:
    """Queries and keys are sorted by clusters of their own; each query block sees the fewest key blocks that matter.

    In each head the video's queries form `query_clusters` and its keys `key_clusters`, by k-means. A query gives a key
    the weight of their centroids' score, so that a cluster counts as often as it has keys. That softmax, summed over
    the keys of a block and averaged over the queries of a block, is the mass of a pair of blocks; kept is the smallest
    set that reaches `mass`, and at least `least`.

    The method's own unit is the cluster, of any size; our kernel's is the block, which holds parts of one or a few
    clusters. The rule is therefore applied to the blocks themselves, with the masses that the clusters give their
    tokens: `mass` means the same. What straddles costs density: on 8,192 tokens in 33 and 108 planted clusters the
    method's own density of 0.37 is executed as 0.41, where computing every block with a chosen pair of clusters would
    be 0.55. A block cannot tell clusters apart that are smaller than itself, so there are no more clusters than blocks.

    The first plan of the released code moves the centroids 50 times and each later one twice, from where they were.
    Plans here know nothing of one another, so each begins with tokens spread over the video and makes `iterations`
    moves, our choice. A batch shares its clusters, of tokens alike in all its elements, and each element has a choice
    of blocks of its own; the released code takes one video at a time.

    Args:
        query_clusters, key_clusters: at most; no more than there are blocks of video. Released for 720p: 300 (Wan), 400
            (HunyuanVideo) and 1000.
        mass: share of the softmax that the key blocks of a query block must reach, 0–1.
        least: share of the key blocks that a query block sees at least, 0–1.
        iterations: moves of the centroids.
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
    query_block_size: int = 64
    key_block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(1, query_clusters=self.query_clusters, key_clusters=self.key_clusters)
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)
        check_shares(mass=self.mass, least=self.least)
        check_integers(0, iterations=self.iterations, seed=self.seed)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        grid = call.grid
        scale = call.scale_of(query)
        sizes = self.query_block_size, self.key_block_size

        def choose(heads: slice, always: Tensor) -> tuple[Tensor, Clusters, Clusters]:
            queries, keys = (
                Clusters.of_video(x[:, heads], grid, most_clusters(clusters, grid, size), self.iterations, self.seed)
                for x, clusters, size in zip((query, key), (self.query_clusters, self.key_clusters), sizes)
            )
            mass = block_mass(queries, keys, scale, grid.num_tokens, *sizes)
            least = max(1, int(self.least * mass.shape[-1]))
            return smallest_set(mass, self.mass, always) | top_blocks(mass, least, always), queries, keys

        return plan_by_clusters(query, grid, *sizes, choose)

"""Sparse VideoGen 2 (arXiv:2505.18875): tokens sorted by what they hold, clusters chosen by their centroids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.block_mask import BlockMask, num_blocks
from diffsparse.grid import TokenGrid
from diffsparse.permutation import Permutation
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_layout import block_layout
from diffsparse.strategies.fixed_masks import sampled_rows
from diffsparse.strategies.k_means import k_means
from diffsparse.strategies.option_checks import check_integers, check_shares
from diffsparse.strategies.planning_memory import slices
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
        check_integers(1, query_block_size=self.query_block_size, key_block_size=self.key_block_size)
        check_shares(mass=self.mass, least=self.least)
        check_integers(0, iterations=self.iterations, seed=self.seed)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        grid = call.grid
        scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
        layout = block_layout(grid, self.query_block_size, self.key_block_size, query.device)
        # In orders of their own the query and the key block of one place have nothing in common: only text is exact.
        always = torch.ones_like(layout.always)
        always[: layout.free_queries, : layout.free_keys] = False
        # Tokens of both sides in float32 and in the order of their clusters.
        bytes_a_head = 16 * query.shape[0] * grid.num_tokens * query.shape[-1]
        parts = [
            self._choose(query[:, heads], key[:, heads], grid, scale, always)
            for heads in slices(query.shape[1], bytes_a_head)
        ]
        visible = torch.cat([part[0] for part in parts], dim=1)
        mask = BlockMask.from_visible(visible, grid.num_tokens, self.query_block_size, self.key_block_size)
        queries, keys = (Permutation(torch.cat([part[side] for part in parts])) for side in (1, 2))
        return AttentionPlan(queries, mask, key_permutation=keys)

    def _choose(
        self, query: Tensor, key: Tensor, grid: TokenGrid, scale: float, always: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Block map [B, H, Q, K] and orders of queries and keys [H, S] of some heads [B, H, S, D]."""
        batch, heads, _, dim = query.shape
        labels, centroids, sizes = zip(
            *(
                _clusters_of_video(x, grid, min(clusters, blocks), self.iterations, self.seed)
                for x, clusters, blocks in (
                    (query, self.query_clusters, num_blocks(grid.num_video_tokens, self.query_block_size)),
                    (key, self.key_clusters, num_blocks(grid.num_video_tokens, self.key_block_size)),
                )
            )
        )
        queries, keys = (x.view(heads, -1, batch, dim).permute(2, 0, 1, 3) for x in centroids)  # [B, H, C, D]
        scores = queries @ keys.transpose(-1, -2) * scale
        # A cluster weighs as much as it has keys; an empty one nothing.
        weights = (scores + sizes[1].float().log()[:, None]).softmax(-1)  # [B, H, Qc, Kc]
        held_queries = _tokens_by_block(sizes[0], grid.num_tokens, self.query_block_size)  # [H, Qc, Q]
        held_keys = _tokens_by_block(sizes[1], grid.num_tokens, self.key_block_size)  # [H, Kc, K]
        share_of_block = held_queries / held_queries.sum(1, keepdim=True).clamp(min=1)
        share_of_cluster = held_keys / sizes[1].clamp(min=1)[..., None]
        mass = share_of_block.transpose(-1, -2) @ weights @ share_of_cluster  # [B, H, Q, K]
        least = max(1, int(self.least * mass.shape[-1]))
        visible = smallest_set(mass, self.mass, always) | top_blocks(mass, least, always)
        return visible, _sorted_by_label(labels[0], grid), _sorted_by_label(labels[1], grid)


def _clusters_of_video(
    x: Tensor, grid: TokenGrid, clusters: int, iterations: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels [H, video tokens], centroids [H, C, B * D] and sizes [H, C] of the video tokens of x [B, H, S, D]."""
    video = x[:, :, grid.text_before : grid.text_before + grid.num_video_tokens]
    features = video.permute(1, 2, 0, 3).flatten(2).float()  # [H, video tokens, B * D]
    first = sampled_rows(grid, clusters, seed, x.device) - grid.text_before
    return k_means(features, features.index_select(1, first), iterations)


def _tokens_by_block(sizes: Tensor, num_tokens: int, block_size: int) -> Tensor:
    """How many tokens of each cluster lie in each block once they are sorted by cluster, [H, C, blocks] float32."""
    end = sizes.cumsum(-1)[..., None]  # [H, C, 1]
    begin = end - sizes[..., None]
    blocks = torch.arange(num_blocks(num_tokens, block_size), device=sizes.device) * block_size
    return (torch.minimum(end, blocks + block_size) - torch.maximum(begin, blocks)).clamp(min=0).float()


def _sorted_by_label(labels: Tensor, grid: TokenGrid) -> Tensor:
    """The order of all tokens: the video by cluster, then the text. [H, S] int64."""
    video = torch.argsort(labels, dim=-1, stable=True) + grid.text_before
    before = torch.arange(grid.text_before, device=labels.device)
    after = torch.arange(grid.num_tokens - grid.text_after, grid.num_tokens, device=labels.device)
    return torch.cat([video, torch.cat([before, after]).expand(len(labels), -1)], dim=-1)

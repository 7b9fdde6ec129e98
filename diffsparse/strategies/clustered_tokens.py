"""Tokens of the video sorted by clusters, and what the clusters say of the blocks that this order is cut into."""

from __future__ import annotations

from collections.abc import Callable
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
from diffsparse.strategies.planning_memory import slices


@dataclass(frozen=True, eq=False)
class Clusters:
    """Clusters of the video's queries, or of its keys, in some heads. A batch shares them.

    Attributes:
        labels: the cluster of each token, [H, video tokens] int64.
        centroids: [B, H, C, D] float32.
        sizes: how many tokens each has, [H, C] int64.
    """

    labels: Tensor
    centroids: Tensor
    sizes: Tensor

    @classmethod
    def of_video(cls, x: Tensor, grid: TokenGrid, count: int, iterations: int, seed: int) -> Clusters:
        """By k-means of the tokens of x [B, H, S, D], from tokens spread over the video."""
        batch, heads, _, dim = x.shape
        # Tokens alike in all elements of the batch.
        features = video_tokens(x, grid).permute(1, 2, 0, 3).flatten(2)  # [H, video tokens, B * D]
        first = first_tokens(grid, count, seed, x.device)
        labels, centroids, sizes = k_means(features, features.index_select(1, first), iterations)
        return cls(labels, centroids.view(heads, -1, batch, dim).permute(2, 0, 1, 3), sizes)

    def order(self, grid: TokenGrid) -> Tensor:
        """The order of all tokens: the video by cluster, then the text. [H, S] int64."""
        video = torch.argsort(self.labels, dim=-1, stable=True) + grid.text_before
        device = self.labels.device
        before = torch.arange(grid.text_before, device=device)
        after = torch.arange(grid.num_tokens - grid.text_after, grid.num_tokens, device=device)
        return torch.cat([video, torch.cat([before, after]).expand(len(self.labels), -1)], dim=-1)

    def tokens_by_block(self, num_tokens: int, block_size: int) -> Tensor:
        """How many tokens of each cluster lie in each block of that order, [H, C, blocks] float32."""
        end = self.sizes.cumsum(-1)[..., None]  # [H, C, 1]
        begin = end - self.sizes[..., None]
        blocks = torch.arange(num_blocks(num_tokens, block_size), device=end.device) * block_size
        return (torch.minimum(end, blocks + block_size) - torch.maximum(begin, blocks)).clamp(min=0).float()

    def shares_of_blocks(self, num_tokens: int, block_size: int) -> Tensor:
        """Which share of the video tokens of each block is of which cluster, [H, blocks, C] float32."""
        held = self.tokens_by_block(num_tokens, block_size)
        return (held / held.sum(1, keepdim=True).clamp(min=1)).transpose(-1, -2)


def video_tokens(x: Tensor, grid: TokenGrid) -> Tensor:
    """Those of x [B, H, S, D] in float32, [B, H, video tokens, D]."""
    return x[:, :, grid.text_before : grid.text_before + grid.num_video_tokens].float()


def first_tokens(grid: TokenGrid, count: int, seed: int, device: torch.device) -> Tensor:
    """Which of the video's tokens clusters begin with, [C] int64: one from each of as many stretches."""
    return sampled_rows(grid, count, seed, device) - grid.text_before


def most_clusters(wanted: int, grid: TokenGrid, block_size: int) -> int:
    """`wanted`, but no more than there are blocks of video: a block cannot tell smaller clusters apart."""
    return min(wanted, num_blocks(grid.num_video_tokens, block_size))


def block_mass(
    queries: Clusters, keys: Clusters, scale: float, num_tokens: int, query_block_size: int, key_block_size: int
) -> Tensor:
    """The share of attention that each query block gives each key block, by the centroids: [B, H, Q, K] float32.

    A query gives a key the weight of their centroids' score, so that a cluster counts as often as it has keys.
    """
    scores = queries.centroids @ keys.centroids.transpose(-1, -2) * scale
    # A cluster weighs as much as it has keys; an empty one nothing.
    weights = (scores + keys.sizes.float().log()[:, None]).softmax(-1)  # [B, H, Qc, Kc]
    share_of_cluster = keys.tokens_by_block(num_tokens, key_block_size) / keys.sizes.clamp(min=1)[..., None]
    return queries.shares_of_blocks(num_tokens, query_block_size) @ weights @ share_of_cluster


def plan_by_clusters(
    query: Tensor,
    grid: TokenGrid,
    query_block_size: int,
    key_block_size: int,
    choose: Callable[[slice, Tensor], tuple[Tensor, Clusters, Clusters]],
    bytes_a_token: int = 0,
) -> AttentionPlan:
    """The plan of a layer whose queries and keys are sorted by clusters of their own.

    Args:
        query: [B, H, S, D].
        choose: (heads, always) -> the block map [B, h, Q, K] of these heads, and the clusters of their queries and
            keys. `always` [Q, K] bool are the blocks with text.
        bytes_a_token: memory that `choose` takes for each token of a head, beside the tokens themselves.
    """
    layout = block_layout(grid, query_block_size, key_block_size, query.device)
    # In orders of their own the query and the key block of one place have nothing in common: only text is exact.
    always = torch.ones_like(layout.always)
    always[: layout.free_queries, : layout.free_keys] = False
    # Tokens of both sides in float32 and in the order of their clusters.
    bytes_a_head = grid.num_tokens * query.shape[0] * (16 * query.shape[-1] + bytes_a_token)
    parts = [choose(heads, always) for heads in slices(query.shape[1], bytes_a_head)]
    visible = torch.cat([visible for visible, _, _ in parts], dim=1)
    return AttentionPlan(
        Permutation(torch.cat([queries.order(grid) for _, queries, _ in parts])),
        BlockMask.from_visible(visible, grid.num_tokens, query_block_size, key_block_size),
        key_permutation=Permutation(torch.cat([keys.order(grid) for _, _, keys in parts])),
    )

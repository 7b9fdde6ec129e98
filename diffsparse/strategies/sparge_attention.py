"""SpargeAttention (arXiv:2502.18137): pooled scores, trusted only where the tokens of a block are alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.kernels.pooling import block_means
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_layout import block_layout
from diffsparse.strategies.option_checks import check_block_sizes, check_density, check_number, check_shares
from diffsparse.strategies.pooled_scores import pooled_scores
from diffsparse.strategies.smallest_set import smallest_set
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.top_blocks import top_blocks


@dataclass(frozen=True)
class SpargeAttention:
    """Each query block sees the fewest key blocks whose pooled softmax reaches `mass`, and all that it cannot judge.

    The self-similarity of a block is the mean cosine between all pairs of its tokens. A key block below `similarity`
    is seen by every query block and takes no part in the softmax; a query block below it sees every key block. The
    mean of all keys is taken off the keys first, as in the released code; whether the similarity is meant to be
    measured before or after that, the paper does not say: here it is after. The softmax itself is the same with and
    without. The tokens stay in frame-major order, and the released kernel's second stage, which skips the value
    product of tiles far below the running maximum, is left out.

    Args:
        mass: share of the pooled softmax that the key blocks of a query block must reach, 0–1.
        density: share of the key blocks to keep instead, the highest scores; None to go by `mass`. The released
            functions are `SpargeAttention()` and `SpargeAttention(density=0.5, similarity=-0.1)`.
        similarity: -1 to 1; from -1 on every block is trusted.
        query_block_size, key_block_size: tokens a block.

    Raises:
        ValueError: an option out of its range.
    """

    mass: float = 0.98
    density: float | None = None
    similarity: float = 0.6
    query_block_size: int = 128
    key_block_size: int = 64

    def __post_init__(self) -> None:
        check_shares(mass=self.mass)
        if self.density is not None:
            check_density(self.density)
        check_number("similarity", self.similarity, -1, 1)
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        blocks = self.query_block_size, self.key_block_size
        layout = block_layout(call.grid, *blocks, query.device)
        query, key = layout.ordered(query), layout.ordered(key)
        scores = pooled_scores(query, key, *blocks, key_length=call.key_length, scale=call.scale)
        alike_queries = self_similarity(query, self.query_block_size) > self.similarity  # [B, H, Q]
        mean_key, _ = block_means(key, key.shape[2], call.key_length)  # of all keys that exist, [B, H, 1, D]
        centred = key.float() - mean_key
        alike_keys = self_similarity(centred, self.key_block_size, call.key_length) > self.similarity  # [B, H, K]
        scores = scores.masked_fill(~alike_keys[..., None, :], -torch.inf)
        if self.density is None:
            # Where no key block can be judged the softmax is NaN, and all are kept.
            visible = smallest_set(scores.softmax(-1).nan_to_num(0.0), self.mass, layout.always)
        else:
            visible = top_blocks(scores, max(1, round(self.density * scores.shape[-1])), layout.always)
        return layout.plan(visible | ~alike_queries[..., :, None] | ~alike_keys[..., None, :])


def self_similarity(x: Tensor, block_size: int, key_length: Tensor | None = None) -> Tensor:
    """The mean cosine between all pairs of tokens of each block of x [B, H, S, D], [B, H, blocks] float32.

    It is the squared length of the mean of the tokens' directions. A block without tokens has 0.
    """
    mean_direction, _ = block_means(F.normalize(x.float(), dim=-1), block_size, key_length)
    return mean_direction.square().sum(-1)

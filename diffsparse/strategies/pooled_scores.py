"""What a query block and a key block have in common: the score between their means."""

from __future__ import annotations

import torch
from torch import Tensor

from diffsparse.kernels.pooling import block_means


def pooled_scores(
    query: Tensor,
    key: Tensor,
    query_block_size: int,
    key_block_size: int,
    *,
    key_length: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Scaled scores between the mean query and the mean key of each pair of blocks, [B, H, Q, K] float32.

    Query and key [B, H, S, D] are in the order in which they are cut into blocks. Keys at or beyond `key_length` [B]
    are left out of their mean; a block without any key has the score -inf. `scale` is D ** -0.5 if None.
    """
    mean_query, _ = block_means(query, query_block_size)
    mean_key, tokens = block_means(key, key_block_size, key_length)
    scores = mean_query @ mean_key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill_((tokens == 0)[:, None, None], -torch.inf)

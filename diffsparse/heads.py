"""Online head classes: what a candidate mask would do to a few sampled rows of each head.

For at most 64 query rows a head, exact attention is computed once for each token order and kept as partial sums by
key block. From these the output of any block mask, with or without a pooled tail, is a small sum, so that candidates
are judged by the error of the very mask that would be executed. The idea of choosing by sampled output error is
Sparse VideoGen's (arXiv:2502.01776, algorithm 1), that of three classes RainFusion's (arXiv:2505.21036).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.kernels.pooling import block_token_counts


class HeadClass(enum.IntEnum):
    """What a head attends to."""

    SPATIAL = 0
    """Its own and neighbouring frames."""
    TEMPORAL = 1
    """Its own place through time."""
    TEXTURAL = 2
    """Wherever the content decides."""


def sample_rows(grid: TokenGrid, count: int, seed: int = 0) -> Tensor:
    """Indices of at most `count` video tokens, one at random from each of as many equal stretches: [R] int64."""
    count = min(count, grid.num_video_tokens)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.arange(count + 1) * grid.num_video_tokens // count
    places = torch.rand(count, generator=generator) * starts.diff()
    return starts[:-1] + places.long() + grid.text_before


@dataclass(frozen=True, eq=False)
class BlockSums:
    """Attention of sampled rows, summed by key block but not yet over the blocks.

    Attributes:
        numerators: [B, H, K, D, R] float32, the weighted values of each block.
        denominators: [B, H, K, R] float32, the weights of each block.
        tail: [B, H, K, R] float32, the weight of each block's pooled key.
        pooled_value: [B, H, K, D] float32.
    """

    numerators: Tensor
    denominators: Tensor
    tail: Tensor
    pooled_value: Tensor

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pooled_key: Tensor,
        block_size: int,
        key_length: Tensor | None = None,
    ) -> BlockSums:
        """Attention of the sampled rows.

        Args:
            query: [B, H, R, D] float32, the sampled rows, scaled.
            key, value: [B, H, S, D], in the token order to be judged.
            pooled_key: [B, H, K, D] float32, the mean key of each block.
            block_size: tokens a key block.
            key_length: [B], keys at or beyond it do not exist.
        """
        batch, heads, tokens, dim = key.shape
        blocks = pooled_key.shape[2]
        lengths = block_token_counts(tokens, block_size, device=key.device)[0].float()
        transposed = query.transpose(-1, -2)
        scores = key.float() @ transposed  # [B, H, S, R]
        tail = pooled_key @ transposed + lengths.log()[:, None]  # [B, H, K, R]
        if key_length is not None:
            beyond = torch.arange(tokens, device=key.device) >= key_length[:, None]
            scores.masked_fill_(beyond[:, None, :, None], -torch.inf)
        # A block's mean score never exceeds its largest, so the tail needs a bound of its own only by its length.
        peak = scores.amax(2, keepdim=True)  # [B, H, 1, R]
        weights = scores.sub_(peak).exp_()
        values = value.float()
        if (padding := blocks * block_size - tokens) > 0:
            weights, values = (F.pad(x, (0, 0, 0, padding)) for x in (weights, values))
        weights = weights.view(batch, heads, blocks, block_size, -1)
        values = values.view(batch, heads, blocks, block_size, dim)
        return cls(
            numerators=values.transpose(-1, -2) @ weights,
            denominators=weights.sum(3),
            tail=tail.sub_(peak).exp_(),
            pooled_value=values.sum(3) / lengths[:, None],
        )

    def exact(self) -> Tensor:
        """Dense attention of the sampled rows, [B, H, D, R]."""
        return self.numerators.sum(2) / self.denominators.sum(2)[:, :, None]

    def masked(self, visible: Tensor) -> tuple[Tensor, Tensor]:
        """What a block mask gives the sampled rows, without and with the pooled tail, each [B, H, D, R].

        `visible` [B|1, H|1, K, R] says which key blocks the query block of each row sees.
        """
        seen = visible.to(self.numerators.dtype)
        numerator = (self.numerators * seen[:, :, :, None]).sum(2)
        denominator = (self.denominators * seen).sum(2)[:, :, None]
        tail = self.tail.masked_fill(visible, 0.0)
        tail_numerator = self.pooled_value.transpose(-1, -2) @ tail
        with_tail = (numerator + tail_numerator) / (denominator + tail.sum(2)[:, :, None])
        return numerator / denominator, with_tail


def head_errors(output: Tensor, exact: Tensor) -> Tensor:
    """Squared error over squared size of the sampled outputs [B, H, D, R], by head: [H]. NaN counts as infinite."""
    error = (output - exact).square().sum(dim=(0, 2, 3)) / exact.square().sum(dim=(0, 2, 3)).clamp_min(1e-12)
    return error.nan_to_num(nan=torch.inf)

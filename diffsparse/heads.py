"""Online head classes: what a candidate mask would do to a few sampled rows of each head.

For at most 64 query rows a head, exact attention is computed once for each token order and kept as partial sums by
key block. From these the output of any block mask, with or without a pooled tail, is a small sum, so that candidates
are judged by the error of the very mask that would be executed. The idea of choosing by sampled output error is
Sparse VideoGen's (arXiv:2502.01776, algorithm 1), that of three classes RainFusion's (arXiv:2505.21036).
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.kernels.first_use import is_right
from diffsparse.kernels.pooling import block_means, block_token_counts


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
        numerators: [B, H, K, D, R] float32, the weighted values of each block, over exp of its peak.
        denominators: [B, H, K, R] float32, the weights of each block, over exp of its peak.
        peaks: [B, H, K, R] float32, the largest score in each block. Each block has its own, so that a mask which
            hides a row's largest scores leaves numbers of the others.
        tail: [B, H, K, R] float32, the logarithm of the weight of each block's pooled key.
        pooled_value: [B, H, K, D] float32.
    """

    numerators: Tensor
    denominators: Tensor
    peaks: Tensor
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
        if key.device.type == "cuda" and (kernel := _kernel(key.device)) is not None:
            return cls(*kernel(query, key, value, block_size, key_length))
        batch, heads, tokens, dim = key.shape
        blocks = pooled_key.shape[2]
        lengths = block_token_counts(tokens, block_size, device=key.device)[0].float()
        transposed = query.transpose(-1, -2)
        scores = key.float() @ transposed  # [B, H, S, R]
        tail = pooled_key @ transposed + lengths.log()[:, None]  # [B, H, K, R]
        if key_length is not None:
            beyond = torch.arange(tokens, device=key.device) >= key_length[:, None]
            scores.masked_fill_(beyond[:, None, :, None], -torch.inf)
        values = value.float()
        if (padding := blocks * block_size - tokens) > 0:
            scores = F.pad(scores, (0, 0, 0, padding), value=-torch.inf)
            values = F.pad(values, (0, 0, 0, padding))
        scores = scores.view(batch, heads, blocks, block_size, -1)
        values = values.view(batch, heads, blocks, block_size, dim)
        peaks = scores.amax(3).clamp_min(_LEAST)  # [B, H, K, R]
        weights = scores.sub_(peaks[:, :, :, None]).exp_()
        by_row = (weights.transpose(-1, -2) @ values).transpose(2, 3).contiguous()  # [B, H, R, K, D]
        return cls(
            numerators=by_row.permute(0, 1, 3, 4, 2),
            denominators=weights.sum(3),
            peaks=peaks,
            tail=tail,
            pooled_value=values.sum(3) / lengths[:, None],
        )

    def exact(self) -> Tensor:
        """Dense attention of the sampled rows, [B, H, D, R]."""
        numerator, denominator = self._sum((self.peaks - self.peaks.amax(2, keepdim=True)).exp_()[:, :, None])
        return (numerator / denominator)[:, :, 0]

    def mass(self) -> Tensor:
        """Share of each row's attention that each block holds, [B, H, K, R]."""
        weights = self.denominators * (self.peaks - self.peaks.amax(2, keepdim=True)).exp_()
        return weights / weights.sum(2, keepdim=True)

    def masked(self, visible: Tensor) -> tuple[Tensor, Tensor]:
        """What a block mask gives the sampled rows, without and with the pooled tail, each [B, H, D, R].

        `visible` [B|1, H|1, K, R] says which key blocks the query block of each row sees. A row that sees no key is
        NaN without the tail.
        """
        without_tail, with_tail = self.masked_each(visible[:, :, None])
        return without_tail[:, :, 0], with_tail[:, :, 0]

    def masked_each(self, visible: Tensor) -> tuple[Tensor, Tensor]:
        """As `masked`, for M masks at once: `visible` [B|1, H|1, M, K, R], the outputs [B, H, M, D, R]."""
        peaks = self.peaks[:, :, None].masked_fill(~visible, _LEAST)
        peak = peaks.amax(3, keepdim=True)  # [B, H, M, 1, R]
        numerator, denominator = self._sum((peaks - peak).exp_().masked_fill_(~visible, 0.0))
        tail = self.tail[:, :, None].masked_fill(visible, -torch.inf)
        peak_with_tail = torch.maximum(peak, tail.amax(3, keepdim=True))
        share = (peak - peak_with_tail).exp_()  # [B, H, M, 1, R]
        tail = tail.sub_(peak_with_tail).exp_()
        tail_numerator = self.pooled_value.transpose(-1, -2)[:, :, None] @ tail
        with_tail = (numerator * share + tail_numerator) / (denominator * share + tail.sum(3, keepdim=True))
        return numerator / denominator, with_tail

    def _sum(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Numerators [B, H, M, D, R] and denominators [B, H, M, 1, R] over blocks that count by [B, H, M, K, R]."""
        by_row = self.numerators.permute(0, 1, 4, 2, 3)  # rows outermost, as they lie in memory: [B, H, R, K, D]
        numerators = (factors.permute(0, 1, 4, 2, 3) @ by_row).permute(0, 1, 3, 4, 2)
        return numerators, (self.denominators[:, :, None] * factors).sum(3, keepdim=True)


_LEAST = torch.finfo(torch.float32).min


@functools.cache
def _kernel(device: torch.device) -> Callable[..., tuple[Tensor, ...]] | None:
    """The Triton kernel for `BlockSums.of`, where it runs and is right on a small input; None elsewhere."""

    def check() -> bool:
        from diffsparse.kernels.block_sums_triton import block_sums

        query, key, value = (torch.randn(1, 2, tokens, 32) for tokens in (5, 70, 70))
        expected = BlockSums.of(query, key, value, block_means(key, 32)[0], 32)
        actual = BlockSums(*block_sums(query.to(device), key.to(device), value.to(device), 32, None))
        return torch.allclose(actual.exact().cpu(), expected.exact(), rtol=1e-3, atol=1e-3)

    if not is_right("judging candidate masks", check):
        return None
    from diffsparse.kernels.block_sums_triton import block_sums

    return block_sums


def head_errors(output: Tensor, exact: Tensor) -> Tensor:
    """Squared error over squared size of the sampled outputs [B, H, ..., D, R], by head: [H, ...].

    `exact` is broadcast to `output`. NaN counts as infinite.
    """
    error = (output - exact).square().sum(dim=(0, -2, -1)) / squared_sizes(exact)
    return error.nan_to_num(nan=torch.inf)


def squared_sizes(exact: Tensor) -> Tensor:
    """Squared size of the outputs [B, H, ..., D, R], by head: [H, ...], above 0."""
    return exact.square().sum(dim=(0, -2, -1)).clamp_min(1e-12)

"""Online head classes: what a candidate mask would do to a few sampled rows of each head.

For at most 64 query rows a head, exact attention is computed once for each token order and kept as partial sums by
key block. From these the output of any block mask, with or without a pooled tail, is a small sum, so that candidates
are judged by the error of the very mask that would be executed. The idea of choosing by sampled output error is
Sparse VideoGen's (arXiv:2502.01776, algorithm 1), that of three classes RainFusion's (arXiv:2505.21036).
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.kernels.first_use import kernels_on
from diffsparse.kernels.pooling import block_means, block_token_counts
from diffsparse.kernels.reorder import gather_tokens


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
    starts = torch.arange(count + 1, device="cpu") * grid.num_video_tokens // count
    places = torch.rand(count, generator=generator, dtype=torch.float32, device="cpu") * starts.diff()
    return starts[:-1] + places.long() + grid.text_before


@dataclass(frozen=True, eq=False)
class BlockSums:
    """Attention of sampled rows, summed by key block but not yet over the blocks.

    Attributes:
        numerators: [B, H, R, K, D] float32, the weighted values of each block, over exp of its peak.
        denominators: [B, H, R, K] float32, the weights of each block, over exp of its peak.
        peaks: [B, H, R, K] float32, the largest score in each block. Each block has its own, so that a mask which
            hides a row's largest scores leaves numbers of the others.
        tail: [B, H, R, K] float32, the logarithm of the weight of each block's mean key.
        mean_key, mean_value: [B, H, K, D] float32, of each block.
    """

    numerators: Tensor
    denominators: Tensor
    peaks: Tensor
    tail: Tensor
    mean_key: Tensor
    mean_value: Tensor

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_size: int,
        order: Tensor | None = None,
        key_length: Tensor | None = None,
    ) -> BlockSums:
        """Attention of the sampled rows.

        Args:
            query: [B, H, R, D] float32, the sampled rows, scaled.
            key, value: [B, H, S, D].
            block_size: tokens a key block.
            order: [S] int64, the token order to be judged; None for that of key and value.
            key_length: [B], keys at or beyond this place of the order do not exist.
        """
        if (kernels := _kernels_for(key, query.shape[2], block_size)) is not None:
            return cls(*kernels.block_sums(query, key, value, block_size, order, key_length))
        if order is not None:
            key, value = gather_tokens(key, order[None]), gather_tokens(value, order[None])
        batch, heads, tokens = key.shape[:3]
        lengths = block_token_counts(tokens, block_size, device=key.device)[0].float()  # [K]
        mean_key, mean_value = (block_means(x, block_size)[0] for x in (key, value))
        tail = query @ mean_key.transpose(-1, -2) + lengths.log()
        scores = key.float() @ query.transpose(-1, -2)  # [B, H, S, R]
        if key_length is not None:
            beyond = torch.arange(tokens, device=key.device) >= key_length[:, None]
            scores.masked_fill_(beyond[:, None, :, None], -torch.inf)
        values = value.float()
        if (padding := len(lengths) * block_size - tokens) > 0:
            scores = F.pad(scores, (0, 0, 0, padding), value=-torch.inf)
            values = F.pad(values, (0, 0, 0, padding))
        scores = scores.view(batch, heads, len(lengths), block_size, -1)
        values = values.unflatten(2, (len(lengths), block_size))
        peaks = scores.amax(3).clamp_min(_LEAST)  # [B, H, K, R]
        weights = scores.sub_(peaks[:, :, :, None]).exp_()
        numerators = weights.transpose(-1, -2) @ values  # [B, H, K, R, D]
        return cls(
            numerators=numerators.transpose(2, 3).contiguous(),
            denominators=weights.sum(3).transpose(2, 3).contiguous(),
            peaks=peaks.transpose(2, 3).contiguous(),
            tail=tail,
            mean_key=mean_key,
            mean_value=mean_value,
        )

    def exact(self) -> Tensor:
        """Dense attention of the sampled rows, [B, H, R, D]."""
        numerator, denominator = self._sum((self.peaks - self.peaks.amax(3, keepdim=True)).exp_()[:, :, :, None])
        return (numerator / denominator)[:, :, :, 0]

    def mass(self) -> Tensor:
        """Share of each row's attention that each block holds, [B, H, R, K]."""
        weights = self.denominators * (self.peaks - self.peaks.amax(3, keepdim=True)).exp_()
        return weights / weights.sum(3, keepdim=True)

    def masked(self, visible: Tensor) -> tuple[Tensor, Tensor]:
        """What a block mask gives the sampled rows, without and with the pooled tail, each [B, H, R, D].

        `visible` [B|1, H|1, R, K] says which key blocks the query block of each row sees. A row that sees no key is
        NaN without the tail.
        """
        without_tail, with_tail = self.masked_each(visible[:, :, :, None])
        return without_tail[:, :, :, 0], with_tail[:, :, :, 0]

    def masked_each(self, visible: Tensor) -> tuple[Tensor, Tensor]:
        """As `masked`, for M masks at once: `visible` [B|1, H|1, R, M, K], the outputs [B, H, R, M, D]."""
        peaks = torch.where(visible, self.peaks[:, :, :, None], -torch.inf)
        peak = peaks.amax(4, keepdim=True).clamp_min_(_LEAST)  # [B, H, R, M, 1]
        numerator, denominator = self._sum(peaks.sub_(peak).exp_())
        tail = torch.where(visible, -torch.inf, self.tail[:, :, :, None])
        peak_with_tail = torch.maximum(peak, tail.amax(4, keepdim=True))
        share = (peak - peak_with_tail).exp_()  # [B, H, R, M, 1]
        tail = tail.sub_(peak_with_tail).exp_()
        tail_numerator = (tail.flatten(2, 3) @ self.mean_value).view_as(numerator)
        with_tail = (numerator * share + tail_numerator) / (denominator * share + tail.sum(4, keepdim=True))
        return numerator / denominator, with_tail

    def errors(self, rank: Tensor, always: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        """What masks cost each head: errors [H, 2, C, N], without and with the pooled tail, and squared sizes [H].

        An error is the squared one on the sampled rows over the squared size of what is exact. A mask shows the key
        blocks that its rule ranks below its limit.

        Args:
            rank: [B|1, H|1, R, C, K] int32, the place of each key block by each of C rules.
            always: [R, K] bool, what every mask shows.
            limits: [N + 1] int64. The last one shows all blocks, which is exact attention.
        """
        if (kernels := _error_kernels(rank.device)) is not None:
            return self._errors_in(kernels, rank, always, limits)
        return self._errors(rank, always, limits)

    def _errors(self, rank: Tensor, always: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        """The specification of `errors`."""
        seen = (rank[..., None, :] < limits[:, None]) | always[:, None, None]  # [B|1, H|1, R, C, N + 1, K]
        outputs = torch.stack(self.masked_each(seen.flatten(3, 4)), dim=3).unflatten(4, seen.shape[3:5])
        exact = outputs[:, :, :, :1, :, -1:]  # [B, H, R, 1, C, 1, D]
        return head_errors(outputs[:, :, :, :, :, :-1], exact), squared_sizes(exact)[:, 0, 0, 0]

    def _errors_in(self, kernels: ModuleType, rank: Tensor, always: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        """`errors` by the Triton kernel: no tensor is made of all masks and key blocks."""
        sums = self.numerators, self.denominators, self.peaks, self.tail, self.mean_value
        squares, sizes = kernels.mask_errors(*sums, rank, always, limits)
        sizes = sizes.clamp_min(_LEAST_SIZE)
        return (squares[..., :-1] / sizes[:, None, None, None]).nan_to_num_(nan=torch.inf), sizes

    def _sum(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Numerators [B, H, R, M, D] and denominators [B, H, R, M, 1] over blocks that count by [B, H, R, M, K]."""
        return factors @ self.numerators, factors @ self.denominators[..., None]


_LEAST = torch.finfo(torch.float32).min
_LEAST_SIZE = 1e-12
"""So that a head whose output is zero can be divided by its size."""


def judged_in_kernels(key: Tensor, rows: int, block_size: int) -> bool:
    """Whether Triton kernels sum keys [B, H, S, D] by block and judge masks by so many rows.

    Then no tensor is made of all keys or of all masks.
    """
    return _kernels_for(key, rows, block_size) is not None and _error_kernels(key.device) is not None


def _kernels_for(key: Tensor, rows: int, block_size: int) -> ModuleType | None:
    """The Triton kernel for `BlockSums.of` such keys, where it runs and their blocks fit; None elsewhere."""
    kernels = _kernels(key.device)
    if kernels is None or not kernels.fits(rows, key.shape[3], block_size, key.element_size()):
        return None
    return kernels


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernel for `BlockSums.of`, where it runs and is right on a small input; None elsewhere."""

    def check(kernels: ModuleType) -> bool:
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(1, 2, tokens, 32, generator=generator, dtype=torch.float32) for tokens in (5, 70, 70)
        )
        order = torch.randperm(70, generator=generator)
        expected = BlockSums.of(query, key, value, 32, order)
        actual = kernels.block_sums(query.to(device), key.to(device), value.to(device), 32, order.to(device))
        return all(torch.allclose(a.cpu(), e, 1e-3, 1e-3) for a, e in zip(actual, vars(expected).values(), strict=True))

    return kernels_on(device, "block_sums_triton", "judging candidate masks", check)


@functools.cache
def _error_kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernel for `BlockSums.errors`, where it runs and is right on a small input; None elsewhere."""

    def check(kernels: ModuleType) -> bool:
        generator = torch.Generator().manual_seed(0)
        # More blocks and a larger head than a program takes at a time; some errors are below 1e-4.
        query, key, value = (
            torch.randn(2, 2, tokens, 80, generator=generator, dtype=torch.float32) for tokens in (5, 270, 270)
        )
        sums = BlockSums.of(query, key, value, 4)
        rank = torch.rand(2, 2, 5, 2, 68, generator=generator, dtype=torch.float32).argsort(-1).int()
        # The first row sees no key at the first limit.
        masks = rank, torch.arange(68) < torch.arange(5)[:, None], torch.tensor([0, 3, 40, 67, 69])
        there = BlockSums(*(x.to(device) for x in vars(sums).values()))
        actual = there._errors_in(kernels, *(x.to(device) for x in masks))
        return all(torch.allclose(a.cpu(), e, 1e-3, 1e-6) for a, e in zip(actual, sums._errors(*masks), strict=True))

    return kernels_on(device, "mask_errors_triton", "errors of candidate masks", check)


def head_errors(output: Tensor, exact: Tensor) -> Tensor:
    """Squared error over squared size of the sampled outputs [B, H, R, ..., D], by head: [H, ...].

    `exact` is broadcast to `output`. NaN counts as infinite.
    """
    error = (output - exact).square().sum(dim=(0, 2, -1)) / squared_sizes(exact)
    return error.nan_to_num(nan=torch.inf)


def squared_sizes(exact: Tensor) -> Tensor:
    """Squared size of the outputs [B, H, R, ..., D], by head: [H, ...], above 0."""
    return exact.square().sum(dim=(0, 2, -1)).clamp_min(_LEAST_SIZE)

"""What each head would lose in a token order, by the error of the executed masks on its sampled rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffsparse.heads import BlockSums, judged_in_kernels
from diffsparse.kernels.pooling import block_means, block_token_counts
from diffsparse.strategies.adaptive_geometry import Geometry, ranks
from diffsparse.strategies.block_impacts import block_impacts
from diffsparse.strategies.error_budget import on_device
from diffsparse.strategies.planning_memory import blockwise_head_slices, summed_head_slices

RULES = ("band", "impact", "top", "random")
"""By which a query block may choose its key blocks: distance, what skipping one would do, product of means, chance."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a layer is planned by.

    Attributes:
        query, key, value: [B, H, S, D].
        rows: [B, H, R, D] float32, the sampled rows of query, scaled.
        scale: factor on the products of queries and keys.
        tail: whether what is skipped may enter as its mean.
        key_length: [B], keys at or beyond this place of every order do not exist.
        noise: [B, H, Q, K], what the rule "random" takes for scores; None where it is not asked for.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rows: Tensor
    scale: float
    tail: bool
    key_length: Tensor | None
    noise: Tensor | None

    def some(self, heads: slice) -> Inputs:
        """Those of some heads."""
        tensors = {name: getattr(self, name)[:, heads] for name in ("query", "key", "value", "rows")}
        return replace(self, **tensors, noise=None if self.noise is None else self.noise[:, heads])


@dataclass(frozen=True, eq=False)
class Means:
    """The means of blocks of tokens in an order: query [B, H, Q, D], key and value [B, H, K, D], float32.

    Of keys and values those that exist; zero where there is none.
    """

    query: Tensor
    key: Tensor
    value: Tensor

    def of_queries(self, blocks: Tensor) -> Means:
        """Those of some query blocks [n], and of all key blocks."""
        return replace(self, query=self.query.index_select(2, blocks))


@dataclass(frozen=True, eq=False)
class Trial:
    """What each head would lose in one order, by each of C rules at each of N numbers of key blocks.

    Attributes:
        errors: [H, 2, C, N], squared error on the sampled rows over their squared size, without and with the pooled
            tail.
        sizes: [H], the squared size.
        means: of the blocks.
    """

    errors: Tensor
    sizes: Tensor
    means: Means

    @classmethod
    def of(cls, number: int, rules: list[str], counts: list[int], inputs: Inputs, geometry: Geometry) -> Trial:
        """Of the order of this number, a few heads at a time."""
        query, rows = inputs.query, inputs.rows.shape[2]
        in_kernels = judged_in_kernels(inputs.key, rows, geometry.key_block_size)
        slices_of = summed_head_slices if in_kernels else blockwise_head_slices
        slices = slices_of(query, rows, geometry.key_block_size)
        parts = [cls._of_some(number, rules, counts, inputs.some(heads), geometry) for heads in slices]
        if len(parts) == 1:
            return parts[0]

        return cls(
            torch.cat([part.errors for part in parts]),
            torch.cat([part.sizes for part in parts]),
            Means(*(torch.cat(tensors, 1) for tensors in zip(*(vars(part.means).values() for part in parts)))),
        )

    @classmethod
    def _of_some(cls, number: int, rules: list[str], counts: list[int], inputs: Inputs, geometry: Geometry) -> Trial:
        order = geometry.order(number)
        order_of_all = None if order is None else order[None]
        mean_query, _ = block_means(inputs.query, geometry.query_block_size, order=order_of_all)
        sums = BlockSums.of(inputs.rows, inputs.key, inputs.value, geometry.key_block_size, order, inputs.key_length)
        means = Means(mean_query, sums.mean_key, sums.mean_value)
        if inputs.key_length is not None:
            # Those of the sums are also of keys that do not exist. No mask leaves such blocks to the tail.
            options = {"key_length": inputs.key_length, "order": order_of_all}
            existing = (block_means(x, geometry.key_block_size, **options)[0] for x in (inputs.key, inputs.value))
            means = Means(mean_query, *existing)
        blocks, always = geometry.blocks_of_rows[number], geometry.always_of_rows[number]

        def rank_by(rule: str) -> Tensor:
            if rule == "band":
                return geometry.band_rank_of_rows[number][None, None]
            if rule == "random":
                assert inputs.noise is not None
                scores = inputs.noise.index_select(2, blocks)
            else:
                scores = scores_by(rule, means.of_queries(blocks), inputs, geometry, order_of_all)
            return ranks(scores.masked_fill_(always, torch.inf), counts[-1])

        rank = torch.stack(torch.broadcast_tensors(*map(rank_by, rules)), dim=3)  # [B|1, H|1, R, C, K]
        # The last one shows all blocks, which is exact attention.
        limits = on_device((*counts, always.shape[1] + 1), rank.device)
        errors, sizes = sums.errors(rank, always, limits)
        return cls(errors, sizes, means)


def scores_by(rule: str, means: Means, inputs: Inputs, geometry: Geometry, order: Tensor | None) -> Tensor:
    """How much query blocks want each key block by "impact" or "top", [B, H, n, K] float32.

    Args:
        rule: "impact", what skipping a key block would do to the output of the mean query, or "top", the product of
            mean query and mean key.
        means: of the n query blocks, and of all key blocks.
        inputs: of the layer.
        geometry: of the grid.
        order: [H|1, S] of the tokens; None for their own.
    """
    if rule == "top":
        return means.query @ means.key.mT
    # About what attention gives the mean query: what it gives it of the means of all key blocks.
    batch, heads, rows, _ = means.query.shape
    query, key, value = (x.flatten(0, 1) for x in (means.query, means.key, means.value))
    log_sizes = geometry.log_key_block_sizes
    if inputs.key_length is not None:
        sizes = block_token_counts(inputs.key.shape[2], geometry.key_block_size, inputs.key_length)  # [B, K]
        log_sizes = sizes.float().log()[:, None, None].expand(-1, heads, -1, -1).flatten(0, 1)  # [B * H, 1, K]
    logits = torch.baddbmm(log_sizes, query, key.mT, alpha=inputs.scale)
    output = (logits.softmax(-1) @ value).view(batch, heads, rows, -1)
    return block_impacts(
        means.query,
        output,
        inputs.key,
        inputs.value,
        geometry.key_block_size,
        scale=inputs.scale,
        tail=inputs.tail,
        order=order,
        key_length=inputs.key_length,
    )

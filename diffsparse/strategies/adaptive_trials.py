"""What each head would lose in a token order, by the error of the executed masks on its sampled rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffsparse.heads import BlockSums, judged_in_kernels
from diffsparse.kernels.pooling import block_means
from diffsparse.strategies.adaptive_geometry import Geometry, ranks
from diffsparse.strategies.error_budget import on_device
from diffsparse.strategies.planning_memory import head_slices, summed_head_slices

RULES = ("band", "top", "random")
"""By which a query block may choose its key blocks: distance, product of means, chance."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a layer is planned by.

    Attributes:
        query, key, value: [B, H, S, D].
        rows: [B, H, R, D] float32, the sampled rows of query, scaled.
        key_length: [B], keys at or beyond this place of every order do not exist.
        noise: [B, H, Q, K], what the rule "random" takes for scores; None where it is not asked for.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rows: Tensor
    key_length: Tensor | None
    noise: Tensor | None

    def some(self, heads: slice) -> Inputs:
        """Those of some heads."""
        tensors = {name: getattr(self, name)[:, heads] for name in ("query", "key", "value", "rows")}
        return replace(self, **tensors, noise=None if self.noise is None else self.noise[:, heads])


@dataclass(frozen=True, eq=False)
class Trial:
    """What each head would lose in one order, by each of C rules at each of N numbers of key blocks.

    Attributes:
        errors: [H, 2, C, N], squared error on the sampled rows over their squared size, without and with the pooled
            tail.
        sizes: [H], the squared size.
        mean_query, mean_key: [B, H, Q|K, D] float32, the means of the blocks.
    """

    errors: Tensor
    sizes: Tensor
    mean_query: Tensor
    mean_key: Tensor

    @classmethod
    def of(cls, number: int, rules: list[str], counts: list[int], inputs: Inputs, geometry: Geometry) -> Trial:
        """Of the order of this number, a few heads at a time."""
        query, rows = inputs.query, inputs.rows.shape[2]
        if judged_in_kernels(query.device):
            slices = summed_head_slices(query, rows, geometry.key_block_size)
        else:
            slices = head_slices(query, rows)
        parts = [cls._of_some(number, rules, counts, inputs.some(heads), geometry) for heads in slices]
        if len(parts) == 1:
            return parts[0]

        def joined(name: str, axis: int) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts], axis)

        return cls(joined("errors", 0), joined("sizes", 0), joined("mean_query", 1), joined("mean_key", 1))

    @classmethod
    def _of_some(cls, number: int, rules: list[str], counts: list[int], inputs: Inputs, geometry: Geometry) -> Trial:
        order = geometry.order(number)
        order_of_all = None if order is None else order[None]
        mean_query, _ = block_means(inputs.query, geometry.query_block_size, order=order_of_all)
        sums = BlockSums.of(inputs.rows, inputs.key, inputs.value, geometry.key_block_size, order, inputs.key_length)
        blocks = geometry.blocks_of_rows[number]
        chosen = [
            rank_by(rule, mean_query, sums.mean_key, inputs.noise, counts[-1], geometry, blocks) for rule in rules
        ]
        rank = torch.stack(torch.broadcast_tensors(*chosen), dim=3)  # [B|1, H|1, R, C, K]
        # The last one shows all blocks, which is exact attention.
        limits = on_device((*counts, geometry.always.shape[1] + 1), rank.device)
        always = geometry.always.index_select(0, blocks)
        errors, sizes = sums.errors(rank, always, limits)
        return cls(errors, sizes, mean_query, sums.mean_key)


def rank_by(
    rule: str,
    mean_query: Tensor,
    mean_key: Tensor,
    noise: Tensor | None,
    count: int,
    geometry: Geometry,
    blocks: Tensor,
) -> Tensor:
    """The place of each key block in the order in which a rule wants them, [B|1, H|1, n, K] int32.

    What is always seen comes first. Behind the first `count` scores all have the same place, K.

    Args:
        rule: one of `RULES`.
        mean_query, mean_key: [B, H, Q|K, D].
        noise: [B, H, Q, K] for "random".
        count: at least as many as are always seen.
        geometry: of the grid.
        blocks: [n] the query blocks.
    """
    if rule == "band":
        return geometry.band_rank.index_select(0, blocks)[None, None]
    if rule == "top":
        scores = mean_query.index_select(2, blocks) @ mean_key.transpose(-1, -2)
    else:
        assert noise is not None
        scores = noise.index_select(2, blocks)
    return ranks(scores.masked_fill_(geometry.always.index_select(0, blocks), torch.inf), count)

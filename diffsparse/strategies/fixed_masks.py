"""Masks that depend on the grid alone, each with its token order: what the heads of a layer choose among."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffsparse.block_mask import BlockMask
from diffsparse.grid import TokenGrid
from diffsparse.heads import BlockSums, head_errors, sample_rows
from diffsparse.permutation import Permutation
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.planning_memory import head_slices
from diffsparse.strategies.strategy import AttentionCall


@dataclass(frozen=True, eq=False)
class FixedMasks:
    """N block masks over a few token orders.

    Attributes:
        orders: the token orders, [M, S] int64.
        places: the place of every token in each of them, [M, S] int64.
        order_of: which of the orders each mask is for, N numbers.
        choice: the same as a tensor, [N] int64.
        visible: [N, Q, K] bool, the block maps.
        mask: the same packed, [1, N, Q, K].
        key_orders: the orders of keys and values where they are not those of the queries, [M, S] int64.
    """

    orders: Tensor
    places: Tensor
    order_of: tuple[int, ...]
    choice: Tensor
    visible: Tensor
    mask: BlockMask
    key_orders: Tensor | None = None

    @classmethod
    def of(
        cls,
        orders: Tensor,
        masks: Sequence[tuple[int, Tensor]],
        query_block_size: int,
        key_block_size: int,
        device: torch.device,
        key_orders: Tensor | None = None,
    ) -> FixedMasks:
        """From orders [M, S], and for each mask the number of its order and its block map [Q, K] bool.

        `key_orders` [M, S] where keys and values have their own. Copies to the device: made once for a grid, and kept.
        """
        order_of = tuple(number for number, _ in masks)
        visible = torch.stack([block_map for _, block_map in masks]).to(device)
        return cls(
            orders=orders.to(device),
            places=torch.argsort(orders, dim=-1).to(device),
            order_of=order_of,
            choice=torch.tensor(order_of, device=device),
            visible=visible,
            mask=BlockMask.from_visible(visible[None], orders.shape[1], query_block_size, key_block_size),
            key_orders=None if key_orders is None else key_orders.to(device),
        )

    def plan(self, chosen: Tensor, classes: Tensor | None = None, skipped: Tensor | None = None) -> AttentionPlan:
        """The plan in which head h runs mask `chosen[h]`, of chosen [H] int64; classes and skipped as the plan's."""
        order = self.choice.index_select(0, chosen)
        return AttentionPlan(
            Permutation(self.orders, order),
            replace(
                self.mask,
                bits=self.mask.bits.index_select(1, chosen),
                counts=self.mask.counts.index_select(1, chosen),
            ),
            classes=classes,
            key_permutation=None if self.key_orders is None else Permutation(self.key_orders, order),
            skipped=skipped,
        )

    def errors(self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, call: AttentionCall) -> Tensor:
        """The squared relative error of each mask for each head on sampled rows, [N, H] float32; see `outputs`."""
        by_slice = [
            torch.stack([head_errors(output, exact) for output, exact in pairs])
            for pairs in self.outputs(query, key, value, rows, call)
        ]
        return torch.cat(by_slice, dim=1)

    def outputs(
        self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, call: AttentionCall
    ) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """What each mask gives the sampled rows by its executed blocks, and what is exact, a few heads at a time.

        Args:
            query, key, value: [B, H, S, D].
            rows: [R] the tokens whose query rows are computed.
            call: where and when.

        Yields:
            For each mask two tensors [B, heads, R, D] float32: its output and the exact one.
        """
        for heads in head_slices(query, len(rows)):
            sampled = query[:, heads].index_select(2, rows).float() * call.scale_of(query)
            pairs: dict[int, tuple[Tensor, Tensor]] = {}
            for number in sorted(set(self.order_of)):
                sums = self._sums(sampled, key[:, heads], value[:, heads], number, call.key_length)
                exact = sums.exact()
                block_of_row = self.places[number].index_select(0, rows) // self.mask.query_block_size
                for mask, order in enumerate(self.order_of):
                    if order == number:
                        seen = self.visible[mask].index_select(0, block_of_row)  # [R, K]
                        pairs[mask] = (sums.masked(seen[None, None])[0], exact)
            yield [pairs[mask] for mask in range(len(self.order_of))]

    def _sums(self, rows: Tensor, key: Tensor, value: Tensor, number: int, key_length: Tensor | None) -> BlockSums:
        """Attention of the scaled rows [B, H, R, D] by key block of one of the orders."""
        orders = self.orders if self.key_orders is None else self.key_orders
        return BlockSums.of(rows, key, value, self.mask.key_block_size, orders[number], key_length)


@functools.lru_cache(maxsize=16)
def sampled_rows(grid: TokenGrid, count: int, seed: int, device: torch.device) -> Tensor:
    """`sample_rows`, kept on the device: [R] int64."""
    return sample_rows(grid, count, seed).to(device)

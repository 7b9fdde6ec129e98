"""Plans of one transformer that were made before, for one grid: what a plan file holds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.permutation import AXES, axis_order

OWN_ORDER = "own"
NAMED_ORDERS = (OWN_ORDER, *(" ".join(axes) for axes in itertools.permutations(AXES)))
"""Orders that the grid alone decides: the tokens' own, and by axes, outermost first, as of `axis_order`."""


class HeadPlan(NamedTuple):
    """What one head runs.

    Attributes:
        block_map: which of the calibration's block maps.
        order, key_order: which of its token orders, of queries and of keys and values.
        tail: 1 where its skipped blocks enter as their pooled mean, else 0.
        head_class: its `HeadClass`, -1 for none.
        skipped: 1 where its output is 0, else 0.
    """

    block_map: int
    order: int
    key_order: int
    tail: int
    head_class: int
    skipped: int


@dataclass(frozen=True)
class Entry:
    """The plan of one layer from a step on, up to the layer's next entry.

    Attributes:
        layer, from_step: both from 0.
        precision: as of `AttentionPlan`; None where the layer is dense.
        heads: the plan of each head; none where the layer is dense.
    """

    layer: int
    from_step: int
    precision: str | None
    heads: tuple[HeadPlan, ...]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Plans, and what they were made for.

    Attributes:
        model: the transformer's class; `num_layers` and `num_heads` of its self-attention.
        grid: where the tokens sit.
        query_block_size, key_block_size: tokens a block.
        strategy: that made the plans, as text.
        num_prompts, num_steps: of the videos that they were made on; steps are None where nothing said how many.
        settings: fields of the `SparseAttentionConfig` that goes with the plans.
        library_version: of the diffsparse that made them.
        maps: the block maps, each once, packed by `pack_bits`: [N, Q, ceil(K / 8)] uint8.
        orders: the token orders, each once: a name of `NAMED_ORDERS`, or token indices [S] int32.
        entries: by layer, then by step.
    """

    model: str
    num_layers: int
    num_heads: int
    grid: TokenGrid
    query_block_size: int
    key_block_size: int
    strategy: str
    num_prompts: int
    num_steps: int | None
    settings: dict[str, Any]
    library_version: str
    maps: Tensor
    orders: tuple[str | Tensor, ...]
    entries: tuple[Entry, ...]

    def entries_of(self, layer: int) -> list[int]:
        """Indices of a layer's entries, by step; none for a layer that was dense."""
        return [index for index, entry in enumerate(self.entries) if entry.layer == layer]

    def made_step(self, step: int, num_steps: int | None) -> int:
        """The step, as far into the steps that the plans were made on as `step` is into `num_steps`."""
        return step if num_steps is None or self.num_steps is None else step * self.num_steps // num_steps


def named_order(name: str, grid: TokenGrid) -> Tensor:
    """The order of a name in `NAMED_ORDERS`, [S] int64."""
    return torch.arange(grid.num_tokens) if name == OWN_ORDER else axis_order(grid, name.split())


def name_of_order(order: Tensor, grid: TokenGrid) -> str | None:
    """The name in `NAMED_ORDERS` of an order [S] on the CPU; None where it has none."""
    return next((name for name in NAMED_ORDERS if torch.equal(named_order(name, grid), order.long())), None)

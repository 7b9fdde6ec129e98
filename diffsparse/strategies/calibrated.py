"""Plans out of a file, made before on the same model and grid."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from diffsparse.block_mask import BlockMask
from diffsparse.calibration import OWN_ORDER, Calibration, named_order
from diffsparse.grid import TokenGrid
from diffsparse.packed_bits import count_bits
from diffsparse.permutation import Permutation
from diffsparse.plan import AttentionPlan
from diffsparse.plan_file import load_plans
from diffsparse.strategies.strategy import AttentionCall


@dataclass(frozen=True, eq=False)
class Calibrated:
    """Serves the plans of a calibration; nothing is decided while the pipeline runs.

    A layer runs its plan of the latest step at or before its own, or the first; with another number of steps, those as
    far into all of them. A layer that has none stays dense. Plans change no more often than `replan_every` says:
    `enable_sparse_attention("plan.safetensors")` takes that from the file.

    Args:
        path: the plan file, for errors.
        calibration: what is in it.
    """

    path: str
    calibration: Calibration = field(repr=False)
    _tables: dict[torch.device, _Tables] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_file(cls, path: str | Path) -> Calibrated:
        """The strategy of a plan file.

        Raises:
            ValueError: the file is missing, damaged, hostile or of a newer diffsparse.
        """
        return cls(str(path), load_plans(path))

    def check_model(self, model: str, num_layers: int) -> None:
        """Raise ValueError unless the plans are for this class of transformer with so many layers."""
        made = self.calibration
        if (model, num_layers) != (made.model, made.num_layers):
            raise ValueError(
                f"The plans in {self.path} are for {made.model} with {made.num_layers} self-attention layers, but this "
                f"is {model} with {num_layers}. {_WAY_OUT}"
            )

    def check_call(self, grid: TokenGrid, num_heads: int) -> None:
        """Raise ValueError unless the plans are for this grid and number of heads."""
        made = self.calibration
        if num_heads != made.num_heads:
            raise ValueError(
                f"The plans in {self.path} are for {made.num_heads} heads, but this model has {num_heads}. {_WAY_OUT}"
            )
        if grid != made.grid:
            raise ValueError(
                f"The plans in {self.path} are for {made.grid!r}, but this call has {grid!r}. Use height, width and "
                f"frames, and text of the length, that they were made for. {_WAY_OUT}"
            )

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan | None:
        """The plan of a layer; see `Strategy.plan`. Raises ValueError on another model, grid or number of heads."""
        if call.model:
            self.check_model(call.model, call.num_layers)
        self.check_call(call.grid, query.shape[1])
        made = self.calibration
        indices = made.entries_of(call.layer)
        if not indices:
            return None
        step = made.made_step(call.step, call.num_steps)
        past = [index for index in indices if made.entries[index].from_step <= step]
        index = past[-1] if past else indices[0]
        entry = made.entries[index]
        if entry.precision is None:
            return None
        if query.device not in self._tables:
            self._tables[query.device] = _Tables.of(made, query.device)
        tables = self._tables[query.device]
        block_map, order, key_order, tail, classes, skipped = tables.heads[index].unbind(1)  # each [H]
        # Heads that all share one map need it once.
        numbers = block_map[:1] if len({head.block_map for head in entry.heads}) == 1 else block_map
        mask = BlockMask(
            tables.maps.index_select(0, numbers)[None],
            tables.counts.index_select(0, numbers)[None],
            made.grid.num_tokens,
            made.query_block_size,
            made.key_block_size,
        )
        same = all(head.order == head.key_order for head in entry.heads)
        own = same and all(tables.is_own[head.order] for head in entry.heads)
        return AttentionPlan(
            None if own else Permutation(tables.orders, order),
            mask,
            tail=tail.bool()[None] if any(head.tail for head in entry.heads) else None,
            classes=classes if all(head.head_class >= 0 for head in entry.heads) else None,
            key_permutation=None if same else Permutation(tables.orders, key_order),
            skipped=skipped.bool() if any(head.skipped for head in entry.heads) else None,
            precision=entry.precision,
            lasts=index == indices[-1],
        )


_WAY_OUT = "Make a file for these with `diffsparse calibrate` (in ComfyUI with DiffSparse Calibrate)."


@dataclass(frozen=True, eq=False)
class _Tables:
    """What all plans of a calibration share, on one device.

    Attributes:
        maps: the packed block maps, [N, Q, P] uint8.
        counts: how many blocks each of their rows sees, [N, Q] int32.
        orders: [M, S] int64; `is_own`, which of them are the tokens' own.
        heads: the `HeadPlan` of each entry and head, 0 for dense entries, [E, H, 6] int64.
    """

    maps: Tensor
    counts: Tensor
    orders: Tensor
    is_own: list[bool]
    heads: Tensor

    @classmethod
    def of(cls, made: Calibration, device: torch.device) -> _Tables:
        """Of a calibration. Waits for values: made once for a device, and kept."""
        orders = torch.stack(
            [named_order(order, made.grid) if isinstance(order, str) else order.long() for order in made.orders]
        )
        no_heads = ((0,) * 6,) * made.num_heads
        return cls(
            maps=made.maps.to(device),
            counts=count_bits(made.maps).int().to(device),
            orders=orders.to(device),
            is_own=[isinstance(order, str) and order == OWN_ORDER for order in made.orders],
            heads=torch.tensor([entry.heads or no_heads for entry in made.entries]).to(device),
        )

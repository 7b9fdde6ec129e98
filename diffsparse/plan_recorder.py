"""Keeps what a strategy plans for several prompts, and makes one calibration of it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

import diffsparse
from diffsparse.block_mask import num_blocks
from diffsparse.calibration import Calibration, Entry, HeadPlan, name_of_order
from diffsparse.config import SparseAttentionConfig
from diffsparse.grid import TokenGrid
from diffsparse.packed_bits import pack_bits, unpack_bits
from diffsparse.permutation import Permutation
from diffsparse.plan import AttentionPlan
from diffsparse.plan_file import SETTINGS, save_plans
from diffsparse.strategies.strategy import AttentionCall, Strategy

Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True)
class _MadeFor:
    """What all plans of a calibration have in common: fields of `Calibration`."""

    model: str
    num_layers: int
    num_heads: int
    grid: TokenGrid
    query_block_size: int
    key_block_size: int
    num_steps: int | None


@dataclass(frozen=True)
class _Vote:
    """What was planned for one row of the batch in one call; no heads where it was to be dense."""

    precision: str | None
    heads: tuple[HeadPlan, ...]


@dataclass(eq=False)
class PlanRecorder:
    """Plans by another strategy and remembers it.

    What is planned for the same layer and step is put to the vote, head by head: by the prompts, the rows of a batch
    and guidance branches that nothing names. The token order that most have is taken; of those that have it, the mean
    of their block maps, of which each row keeps the blocks that most see, as many as they see on average. Ties go to
    what was planned first, so that one prompt alone is kept as it is.
    """

    strategy: Strategy
    num_prompts: int = 0
    _made_for: _MadeFor | None = None
    _maps: _Numbers = field(default_factory=lambda: _Numbers())
    _orders: _Numbers = field(default_factory=lambda: _Numbers())
    _votes: dict[tuple[int, int], list[_Vote]] = field(default_factory=dict)
    _of_this_prompt: list[tuple[tuple[int, int], _Vote]] = field(default_factory=list)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan | None:
        """The plan of the other strategy; see `Strategy.plan`.

        Raises:
            ValueError: it is for another model, grid, number of heads or block size than the plans before it.
        """
        plan = self.strategy.plan(query, key, value, call)
        place = (call.layer, call.step)
        if plan is None:
            self._of_this_prompt.append((place, _Vote(None, ())))
            return None
        made_for = _MadeFor(
            call.model,
            call.num_layers,
            query.shape[1],
            call.grid,
            plan.mask.query_block_size,
            plan.mask.key_block_size,
            call.num_steps,
        )
        if self._made_for is None:
            self._made_for = made_for
        if made_for != self._made_for:
            raise ValueError(
                f"A plan file is for one model, grid and block size, but layer {call.layer} was planned for {made_for} "
                f"after {self._made_for}. Where the text differs in length, calibrate with one prompt."
            )
        self._of_this_prompt += [(place, vote) for vote in self._votes_of(plan, query.shape[1])]
        return plan

    def end_prompt(self) -> None:
        """What was planned since the last prompt counts from now on."""
        for place, vote in self._of_this_prompt:
            self._votes.setdefault(place, []).append(vote)
        self._of_this_prompt.clear()
        self.num_prompts += 1

    def save(self, path: Path, config: SparseAttentionConfig) -> None:
        """Write what the prompts so far agree on, as `calibration` gives it, to a plan file, whole or not at all.

        Raises:
            ValueError: nothing was planned.
            OSError: the file cannot be written.
        """
        save_plans(path, self.calibration(config))

    def calibration(self, config: SparseAttentionConfig) -> Calibration:
        """What the prompts so far agree on.

        Args:
            config: that the plans were made with, before this recorder took the place of its strategy.

        Raises:
            ValueError: nothing was planned.
        """
        made_for = self._made_for
        if made_for is None or not self._votes:
            raise ValueError("no attention call was planned")
        maps, orders = _Numbers(), _Numbers()
        entries: list[Entry] = []
        for (layer, step), votes in sorted(self._votes.items(), key=lambda item: item[0]):
            precision = _commonest(vote.precision for vote in votes)
            heads = tuple(
                self._merged(list(of_head), maps, orders)
                for of_head in zip(*(vote.heads for vote in votes if vote.precision == precision))
            )
            entry = Entry(layer, step, precision, heads)
            last = entries[-1] if entries else None
            if last is None or (last.layer, last.precision, last.heads) != (layer, precision, heads):
                entries.append(entry)
        if not any(entry.heads for entry in entries):
            raise ValueError("every attention call is to stay dense")
        return Calibration(
            **vars(made_for),
            strategy=repr(config.strategy),
            num_prompts=self.num_prompts,
            settings={name: getattr(config, name) for name in SETTINGS},
            library_version=diffsparse.__version__,
            maps=torch.stack(maps.tensors),
            orders=tuple(name_of_order(order, made_for.grid) or order for order in orders.tensors),
            entries=tuple(entries),
        )

    def _votes_of(self, plan: AttentionPlan, num_heads: int) -> list[_Vote]:
        bits = plan.mask.bits.cpu()  # [B|1, H|1, Q, P]
        size = (len(bits), num_heads)
        maps = [[self._maps.number(head) for head in row] for row in bits]
        order = self._numbers_of_orders(plan.permutation, plan, num_heads)
        key_order = order
        if plan.key_permutation is not None:
            key_order = self._numbers_of_orders(plan.key_permutation, plan, num_heads)
        tail = _flags(plan.tail, size)
        classes = [-1] * num_heads if plan.classes is None else plan.classes.tolist()
        skipped = _flags(plan.skipped, size)
        return [
            _Vote(
                plan.precision,
                tuple(map(HeadPlan, (of_row * num_heads)[:num_heads], order, key_order, tails, classes, skips)),
            )
            for of_row, tails, skips in zip(maps, tail, skipped)
        ]

    def _numbers_of_orders(self, permutation: Permutation | None, plan: AttentionPlan, num_heads: int) -> list[int]:
        """The number of each head's order."""
        if permutation is None:
            return [self._orders.number(torch.arange(plan.mask.num_tokens, dtype=torch.int32))] * num_heads
        numbers = [self._orders.number(order) for order in permutation.orders.to("cpu", torch.int32)]
        choice = list(range(len(numbers))) if permutation.choice is None else permutation.choice.tolist()
        return [numbers[choice[head % len(choice)]] for head in range(num_heads)]

    def _merged(self, votes: list[HeadPlan], maps: _Numbers, orders: _Numbers) -> HeadPlan:
        """What the votes for one head agree on, with numbers in these lists."""
        order, key_order = _commonest((vote.order, vote.key_order) for vote in votes)
        agreeing = [vote for vote in votes if (vote.order, vote.key_order) == (order, key_order)]
        return HeadPlan(
            block_map=maps.number(self._mean_map([self._maps.tensors[vote.block_map] for vote in agreeing])),
            order=orders.number(self._orders.tensors[order]),
            key_order=orders.number(self._orders.tensors[key_order]),
            tail=_commonest(vote.tail for vote in agreeing),
            head_class=_commonest(vote.head_class for vote in agreeing),
            skipped=_commonest(vote.skipped for vote in agreeing),
        )

    def _mean_map(self, packed: list[Tensor]) -> Tensor:
        """Of packed maps [Q, P], the blocks that most see, in each row as many as they see on average."""
        if all(torch.equal(packed[0], other) for other in packed[1:]):
            return packed[0]
        assert self._made_for is not None
        key_blocks = num_blocks(self._made_for.grid.num_tokens, self._made_for.key_block_size)
        visible = unpack_bits(torch.stack(packed), key_blocks).float()  # [N, Q, K]
        counts = visible.sum(-1).mean(0).round()
        # Half a vote more decides ties, and nothing else.
        score = visible.sum(0) + 0.5 * visible[0]
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return pack_bits(rank < counts[:, None])


class _Numbers:
    """Tensors, each kept once, by number."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._number_of: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def number(self, tensor: Tensor) -> int:
        """The number of an equal tensor, or of this one from now on."""
        contents = tensor.contiguous().numpy().tobytes()
        # ComfyUI has a thread for each of several GPUs.
        with self._lock:
            if contents not in self._number_of:
                self._number_of[contents] = len(self.tensors)
                self.tensors.append(tensor)
            return self._number_of[contents]


def _flags(flags: Tensor | None, size: tuple[int, int]) -> list[list[int]]:
    """Flags [H], [B|1, H|1] or None, for each row of the batch and head, 0 or 1."""
    if flags is None:
        return [[0] * size[1]] * size[0]
    return flags.to("cpu", torch.int32).expand(size).tolist()


def _commonest(items: Iterable[Item]) -> Item:
    """What is there most often, of several the first."""
    return Counter(items).most_common(1)[0][0]

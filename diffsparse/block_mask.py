"""Which key blocks each query block sees."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import Tensor

from diffsparse.kernels.first_use import kernels_on
from diffsparse.kernels.launch import is_captured
from diffsparse.kernels.schedule import heavy_first
from diffsparse.packed_bits import pack_bits, unpack_bits


@dataclass(frozen=True, eq=False)
class BlockMask:
    """For each query block, the key blocks that it attends to exactly.

    A plan keeps one for every layer, so it is small: a bit a pair of blocks. `lists` are for a kernel, and gone after
    it.

    Attributes:
        bits: [B|1, H|1, Q, ceil(K / 8)] uint8, the block map, packed by `pack_bits`.
        counts: [B|1, H|1, Q] int32, how many key blocks each query block sees, at least 1.
        num_tokens: S, the tokens of the sequence; the last block of either kind may be ragged.
        query_block_size, key_block_size: tokens a block.
        num_queries: how many of the sequence's tokens are queries, the first ones; None for all.
    """

    bits: Tensor
    counts: Tensor
    num_tokens: int
    query_block_size: int
    key_block_size: int
    num_queries: int | None = None
    _schedules: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        num_queries = self.num_tokens if self.num_queries is None else self.num_queries
        expected = num_blocks(num_queries, self.query_block_size), num_blocks(self.num_key_blocks, 8)
        if self.bits.ndim != 4 or self.bits.shape[2:] != expected:
            raise ValueError(
                f"`bits` must have the shape [B|1, H|1, {expected[0]}, {expected[1]}] for {num_queries} queries in "
                f"blocks of {self.query_block_size} and {self.num_tokens} keys in blocks of {self.key_block_size}, got "
                f"{tuple(self.bits.shape)}."
            )
        if self.counts.shape != self.bits.shape[:3]:
            raise ValueError(
                f"`counts` must have the shape {tuple(self.bits.shape[:3])}, one number for each query block, got "
                f"{tuple(self.counts.shape)}."
            )

    @classmethod
    def from_visible(cls, visible: Tensor, num_tokens: int, query_block_size: int, key_block_size: int) -> BlockMask:
        """Of a boolean block map `visible` [B|1, H|1, Q, K].

        A row that sees nothing would have no softmax; it is given key block 0.
        """
        counts = visible.sum(-1, dtype=torch.int32)
        bits = pack_bits(visible)
        bits[..., 0] |= counts == 0
        return cls(bits, counts.clamp_(min=1), num_tokens, query_block_size, key_block_size)

    def of_first_queries(self, num_queries: int) -> BlockMask:
        """The rows of so many queries, the first ones."""
        rows = slice(num_blocks(num_queries, self.query_block_size))
        bits, counts = self.bits[:, :, rows].contiguous(), self.counts[:, :, rows].contiguous()
        return replace(self, bits=bits, counts=counts, num_queries=num_queries)

    @property
    def num_key_blocks(self) -> int:
        """K, how many key blocks there are."""
        return num_blocks(self.num_tokens, self.key_block_size)

    @functools.cached_property
    def density(self) -> Tensor:
        """Share of key blocks computed exactly, by head: [H|1] float32, on the mask's device. Kept: each call asks."""
        return self.counts.float().mean(dim=(0, 2)) / self.num_key_blocks

    def visible(self) -> Tensor:
        """The boolean block map [B|1, H|1, Q, K]."""
        return unpack_bits(self.bits, self.num_key_blocks)

    def lists(self) -> Tensor:
        """The key blocks of each query block, ascending, as kernels read them: [B|1, H|1, Q, K] int32.

        What follows the first `counts` of a row is 0.
        """
        kernels = _kernels(self.bits.device)
        if kernels is None:
            return _lists(self.visible())
        lists: Tensor = kernels.lists_of(self.bits, self.num_key_blocks)
        return lists

    def schedule(self, batch: int, heads: int) -> Tensor:
        """In which order to start the query blocks of so many heads, [B * H * Q] int32. Made once and kept."""
        schedule = self._schedules.get((batch, heads))
        if schedule is None:
            schedule = heavy_first(self.counts.expand(batch, heads, -1))
            # What a graph that is being captured makes is there only while it is replayed.
            if not is_captured(self.counts.device):
                self._schedules[batch, heads] = schedule
        return schedule


def num_blocks(num_tokens: int, block_size: int) -> int:
    """How many blocks of `block_size` cover `num_tokens`, the last one perhaps ragged."""
    return -(-num_tokens // block_size)


def _lists(visible: Tensor) -> Tensor:
    """The specification of `BlockMask.lists`, of a boolean block map [..., K]."""
    num_blocks = visible.shape[-1]
    # From 1 on. What is not seen goes to place 0, which is cut off.
    place = visible.cumsum(-1).mul_(visible)
    lists = visible.new_zeros((*visible.shape[:-1], num_blocks + 1), dtype=torch.int32)
    blocks = torch.arange(num_blocks, dtype=torch.int32, device=visible.device)
    return lists.scatter_(-1, place, blocks.expand_as(place))[..., 1:]


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernel for `BlockMask.lists`, where it runs and is right on a small mask; None elsewhere."""

    def check(kernels: ModuleType) -> bool:
        # More blocks than the kernel takes at a time.
        visible = torch.rand((2, 3, 1100), generator=torch.Generator().manual_seed(0), device="cpu") < 0.4
        return torch.equal(kernels.lists_of(pack_bits(visible).to(device), 1100).cpu(), _lists(visible))

    return kernels_on(device, "lists_triton", "listing key blocks", check)

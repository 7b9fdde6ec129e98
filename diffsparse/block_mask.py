"""Which key blocks each query block sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockMask:
    """For each query block, the list of key blocks that it attends to exactly.

    A plan keeps one for every layer, so it is small: numbers of two bytes where these are enough, and no list for
    the query blocks of text, which see everything and would make the lists of all others as long. `lists` are for
    a kernel, and gone after it.

    Attributes:
        key_blocks: [B|1, H|1, Q - num_complete, C] int16 or int32; the first `counts` entries of a row are key-block
            indices.
        counts: [B|1, H|1, Q] int32, at least 1.
        num_tokens: S, the tokens of the sequence; the last block of either kind may be ragged.
        query_block_size, key_block_size: tokens a block.
        num_complete: how many query blocks, the last ones, see every key block and have no list.
    """

    key_blocks: Tensor
    counts: Tensor
    num_tokens: int
    query_block_size: int
    key_block_size: int
    num_complete: int = 0

    def __post_init__(self) -> None:
        num_query_blocks = num_blocks(self.num_tokens, self.query_block_size)
        expected = num_query_blocks - self.num_complete
        if self.key_blocks.ndim != 4 or self.key_blocks.shape[2] != expected:
            raise ValueError(
                f"`key_blocks` must have the shape [B|1, H|1, {expected}, C] for {self.num_tokens} tokens in query "
                f"blocks of {self.query_block_size}, {self.num_complete} of them without a list, "
                f"got {tuple(self.key_blocks.shape)}."
            )
        if self.counts.shape != (*self.key_blocks.shape[:2], num_query_blocks):
            raise ValueError(
                f"`counts` must have the shape {(*self.key_blocks.shape[:2], num_query_blocks)}, one number for each "
                f"query block, got {tuple(self.counts.shape)}."
            )

    @classmethod
    def from_visible(
        cls,
        visible: Tensor,
        num_tokens: int,
        query_block_size: int,
        key_block_size: int,
        capacity: int | None = None,
        num_complete: int = 0,
    ) -> BlockMask:
        """The lists of a boolean block map `visible` [B|1, H|1, Q, K].

        `num_complete` is how many rows at the end see everything, and `capacity` the longest list of the others,
        where the caller knows it: both save memory without a look at the values. A row that sees nothing would have
        no softmax; it is given key block 0.
        """
        num_key_blocks = visible.shape[-1]
        capacity = num_key_blocks if capacity is None else capacity
        num_listed = visible.shape[2] - num_complete
        counts = visible.sum(-1, dtype=torch.int32).clamp_(min=1)
        counts[:, :, :num_listed].clamp_(max=capacity)
        counts[:, :, num_listed:].fill_(num_key_blocks)
        # A stable sort puts the visible blocks first and keeps them in memory order.
        hidden = visible[:, :, :num_listed].logical_not().to(torch.uint8)
        lists = torch.argsort(hidden, dim=-1, stable=True)[..., :capacity].to(list_dtype(num_key_blocks))
        return cls(lists, counts, num_tokens, query_block_size, key_block_size, num_complete)

    @property
    def num_key_blocks(self) -> int:
        """K, how many key blocks there are."""
        return num_blocks(self.num_tokens, self.key_block_size)

    @property
    def density(self) -> Tensor:
        """Share of key blocks computed exactly, by head: [H|1] float32, on the mask's device."""
        return self.counts.float().mean(dim=(0, 2)) / self.num_key_blocks

    def lists(self) -> Tensor:
        """A list for every query block, as kernels read them: like `key_blocks`, [B|1, H|1, Q, C'] int32."""
        if self.num_complete == 0:
            return self.key_blocks.int()
        lists = self.counts.new_zeros((*self.counts.shape, self.num_key_blocks))
        num_listed, capacity = self.key_blocks.shape[2:]
        lists[:, :, :num_listed, :capacity] = self.key_blocks
        lists[:, :, num_listed:] = torch.arange(self.num_key_blocks, device=lists.device)
        return lists

    def visible(self) -> Tensor:
        """The boolean block map [B|1, H|1, Q, K]."""
        lists = self.lists()
        listed = torch.arange(lists.shape[-1], device=self.counts.device) < self.counts[..., None]
        visible = torch.zeros(*self.counts.shape, self.num_key_blocks + 1, dtype=torch.bool, device=self.counts.device)
        # Entries beyond the count go to a column of their own, which is cut off.
        index = torch.where(listed, lists, self.num_key_blocks).long()
        return visible.scatter_(-1, index, True)[..., :-1]


def count_complete(counts: Tensor, num_key_blocks: int) -> int:
    """How many query blocks at the end of each of the counts [N, Q] see every key block, at most all but the first.

    Waits for the values.
    """
    incomplete = (counts[:, 1:] < num_key_blocks).any(0).nonzero()
    return counts.shape[1] - 1 - (int(incomplete[-1]) + 1 if len(incomplete) else 0)


def list_dtype(num_key_blocks: int) -> torch.dtype:
    """The smallest dtype that holds the numbers of so many key blocks."""
    return torch.int16 if num_key_blocks <= torch.iinfo(torch.int16).max + 1 else torch.int32


def num_blocks(num_tokens: int, block_size: int) -> int:
    """How many blocks of `block_size` cover `num_tokens`, the last one perhaps ragged."""
    return -(-num_tokens // block_size)

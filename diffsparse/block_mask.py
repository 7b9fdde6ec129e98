"""Which key blocks each query block sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockMask:
    """For each query block, the list of key blocks that it attends to exactly.

    Attributes:
        key_blocks: [B|1, H|1, Q, C] int32; the first `counts` entries of a row are key-block indices.
        counts: [B|1, H|1, Q] int32, at least 1.
        num_tokens: S, the tokens of the sequence; the last block of either kind may be ragged.
        query_block_size, key_block_size: tokens a block.
    """

    key_blocks: Tensor
    counts: Tensor
    num_tokens: int
    query_block_size: int
    key_block_size: int

    def __post_init__(self) -> None:
        expected = num_blocks(self.num_tokens, self.query_block_size)
        if self.key_blocks.ndim != 4 or self.key_blocks.shape[2] != expected:
            raise ValueError(
                f"`key_blocks` must have the shape [B|1, H|1, {expected}, C] for {self.num_tokens} tokens in query "
                f"blocks of {self.query_block_size}, got {tuple(self.key_blocks.shape)}."
            )
        if self.counts.shape != self.key_blocks.shape[:3]:
            raise ValueError(
                f"`counts` must have the shape {tuple(self.key_blocks.shape[:3])}, one number for each list, "
                f"got {tuple(self.counts.shape)}."
            )

    @classmethod
    def from_visible(
        cls,
        visible: Tensor,
        num_tokens: int,
        query_block_size: int,
        key_block_size: int,
        capacity: int | None = None,
    ) -> BlockMask:
        """The lists of a boolean block map `visible` [B|1, H|1, Q, K].

        `capacity` is the longest list there is, where the caller knows it: it saves memory without a look at the
        values. A row that sees nothing would have no softmax; it is given key block 0.
        """
        capacity = visible.shape[-1] if capacity is None else capacity
        counts = visible.sum(-1, dtype=torch.int32).clamp_(min=1, max=capacity)
        # A stable sort puts the visible blocks first and keeps them in memory order.
        lists = torch.argsort(visible.logical_not().to(torch.uint8), dim=-1, stable=True)[..., :capacity]
        return cls(lists.to(torch.int32), counts, num_tokens, query_block_size, key_block_size)

    @property
    def num_key_blocks(self) -> int:
        """K, how many key blocks there are."""
        return num_blocks(self.num_tokens, self.key_block_size)

    @property
    def density(self) -> Tensor:
        """Share of key blocks computed exactly, by head: [H|1] float32, on the mask's device."""
        return self.counts.float().mean(dim=(0, 2)) / self.num_key_blocks

    def visible(self) -> Tensor:
        """The boolean block map [B|1, H|1, Q, K]."""
        listed = torch.arange(self.key_blocks.shape[-1], device=self.counts.device) < self.counts[..., None]
        visible = torch.zeros(*self.counts.shape, self.num_key_blocks + 1, dtype=torch.bool, device=self.counts.device)
        # Entries beyond the count go to a column of their own, which is cut off.
        index = torch.where(listed, self.key_blocks, self.num_key_blocks).long()
        return visible.scatter_(-1, index, True)[..., :-1]


def num_blocks(num_tokens: int, block_size: int) -> int:
    """How many blocks of `block_size` cover `num_tokens`, the last one perhaps ragged."""
    return -(-num_tokens // block_size)

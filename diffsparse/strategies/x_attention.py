"""XAttention (arXiv:2503.16428): blocks scored by the sums of their antidiagonals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.block_mask import num_blocks
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_layout import block_layout
from diffsparse.strategies.option_checks import check_block_sizes, check_integers, check_shares
from diffsparse.strategies.planning_memory import slices
from diffsparse.strategies.smallest_set import smallest_set
from diffsparse.strategies.strategy import AttentionCall


@dataclass(frozen=True)
class XAttention:
    """Each query block sees the fewest key blocks whose share of an antidiagonal softmax reaches `mass`.

    Queries and keys are taken in groups of `stride` tokens. The score of two groups is the mean of the scores on the
    antidiagonal between them, which meets every row and every column of the map once. The softmax of a group of
    queries goes over all groups of keys, and a pair of blocks has the sum of its groups. The causal method also
    forces the first key block; here, where nothing is causal, what is forced is what every strategy keeps exact.

    The released video runs use stride 8, a mass of 0.9 or 0.95, 5 of 50 steps dense and a new mask at every step:
    `SparseAttentionConfig(XAttention(), dense_steps=0.1, replan_every=1)`.

    Args:
        mass: share of the softmax that the key blocks of a query block must reach, 0–1.
        stride: tokens a group; both block sizes are multiples of it.
        query_block_size, key_block_size: tokens a block.

    Raises:
        ValueError: an option out of its range.
    """

    mass: float = 0.9
    stride: int = 8
    query_block_size: int = 128
    key_block_size: int = 128

    def __post_init__(self) -> None:
        check_shares(mass=self.mass)
        blocks = {"query_block_size": self.query_block_size, "key_block_size": self.key_block_size}
        check_integers(1, stride=self.stride)
        check_block_sizes(**blocks)
        for name, size in blocks.items():
            if size % self.stride:
                raise ValueError(f"`{name}` must be a multiple of `stride`, {self.stride}, got {size}.")

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        layout = block_layout(call.grid, self.query_block_size, self.key_block_size, query.device)
        scale = call.scale_of(query)
        mass = self._block_mass(layout.ordered(query), layout.ordered(key), call.key_length, scale)
        return layout.plan(smallest_set(mass, self.mass, layout.always))

    def _block_mass(self, query: Tensor, key: Tensor, key_length: Tensor | None, scale: float) -> Tensor:
        """The antidiagonal softmax, summed by pairs of blocks: [B, H, Q, K] float32."""
        batch, heads, tokens, dim = query.shape
        groups = num_blocks(tokens, self.stride)
        if key_length is not None:
            beyond = torch.arange(tokens, device=key.device) >= key_length[:, None]
            key = key.masked_fill(beyond[:, None, :, None], 0)
            has_no_key = torch.arange(groups, device=key.device) * self.stride >= key_length[:, None]
        padding = groups * self.stride - tokens
        query, key = (F.pad(x, (0, 0, 0, padding)).view(batch, heads, groups, self.stride, dim) for x in (query, key))
        # [B, H, G, stride * D], scaled before the product, which half precision might not hold.
        query, key = (query * (scale / self.stride)).flip(3).flatten(3), key.flatten(3)
        rows = self.query_block_size // self.stride
        columns = self.key_block_size // self.stride
        key_blocks = num_blocks(groups, columns)
        mass = query.new_empty((batch, heads, num_blocks(groups, rows), key_blocks), dtype=torch.float32)
        # Float32 scores and their softmax.
        for part in slices(mass.shape[2], 8 * batch * heads * rows * groups):
            scores = (query[:, :, part.start * rows : part.stop * rows] @ key.transpose(-1, -2)).float()
            if key_length is not None:
                scores.masked_fill_(has_no_key[:, None, None], -torch.inf)
            weights = F.pad(scores.softmax(-1), (0, key_blocks * columns - groups, 0, -scores.shape[2] % rows))
            mass[:, :, part] = weights.unflatten(3, (key_blocks, columns)).sum(4).unflatten(2, (-1, rows)).sum(3)
        return mass

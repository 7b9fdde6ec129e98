"""VMoBA: each query sees the chunks of the video whose mean key it agrees with, chunks cut anew from layer to layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.block_mask import BlockMask
from diffsparse.grid import TokenGrid
from diffsparse.kernels.pooling import block_means, block_token_counts
from diffsparse.permutation import Permutation, tile_of_token, tile_order
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.always_exact import exact_blocks
from diffsparse.strategies.chunk_selection import best_by_number, best_by_threshold
from diffsparse.strategies.option_checks import check_block_sizes, check_choice, check_integers, check_shares
from diffsparse.strategies.planning_memory import head_slices
from diffsparse.strategies.strategy import AttentionCall


@dataclass(frozen=True)
class VMoBA:
    """Chunks of frames, of places and of boxes take turns over the layers; queries select chunks by their mean key.

    VMoBA, arXiv:2506.23858. Layers 0, 3, … have chunks of whole frames, layers 1, 4, … chunks of places through all
    frames, layers 2, 5, … boxes. The gate of a query and a chunk is the product of the query with the mean of the
    chunk's keys, unscaled. A query always sees its own chunk. Text, which VMoBA does not know, sees all and is
    seen by all. Chunks at the far sides of the grid may be smaller, where the published code refuses the grid.

    In VMoBA every query token selects for itself. Here a block of queries does, which `routing` says how; a block that
    lies in several chunks has them all for its own. A key block is seen when at least half of it lies in selected
    chunks, so a chunk should hold at least a block. With query blocks of one token it is VMoBA to the letter, and
    slow. The density follows from the selection; there is no option for it.

    Args:
        frames_chunk: frames of a chunk of the first kind.
        places_chunk: height, width of a chunk of the second kind, in tokens.
        box_chunk: frames, height, width of a chunk of the third kind, in tokens.
        select: "threshold" (the released code's default): the best chunks that together with the own one make up
            `threshold` of the gates, scaled to 0–1 in their scope, and at least one beside the own. "top-k" (called
            more stable without training by the paper): the `top_k` best, the own one included.
        scope: what gates compete in: "query-head" (the released code's default), those of one query of a head; or
            "head-global" (the paper's), those of a head, in which some queries get more chunks than others.
        routing: "mean", a block selects by the mean of its tokens' gates; or "union", it sees what any of its tokens
            selects, which takes more memory and is denser.
        threshold: see `select`, 0–1.
        top_k: how many chunks of each of the three kinds, see `select`.
        query_block_size, key_block_size: tokens a block.

    Raises:
        ValueError: an option out of its range.
    """

    frames_chunk: int = 2
    places_chunk: tuple[int, int] = (3, 4)
    box_chunk: tuple[int, int, int] = (4, 6, 4)
    select: str = "threshold"
    scope: str = "query-head"
    routing: str = "mean"
    threshold: float = 0.25
    top_k: tuple[int, int, int] = (3, 20, 15)
    query_block_size: int = 64
    key_block_size: int = 64

    def __post_init__(self) -> None:
        check_integers(1, frames_chunk=self.frames_chunk)
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)
        for name, length in (("places_chunk", 2), ("box_chunk", 3), ("top_k", 3)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != length:
                raise ValueError(f"`{name}` must be a tuple of {length} integers, got {value!r}.")
            for each in value:
                check_integers(1, **{name: each})
        check_choice("select", self.select, ("threshold", "top-k"))
        check_choice("scope", self.scope, ("query-head", "head-global"))
        check_choice("routing", self.routing, ("mean", "union"))
        check_shares(threshold=self.threshold)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        grid, kind = call.grid, call.layer % 3
        tile = (
            (self.frames_chunk, grid.height, grid.width),
            (grid.frames, *self.places_chunk),
            self.box_chunk,
        )[kind]
        layout = _layout(grid, tile, self.query_block_size, self.key_block_size, query.device)
        own = layout.own_of_block if self.routing == "mean" else layout.own_of_token()
        # The selection takes a few tensors as large as the gates: so many rows of scores.
        rows = 6 * own.numel() // grid.num_tokens + 1
        visible = []
        for heads in head_slices(query, rows):
            gates = self._gates(query[:, heads], key[:, heads], layout)
            selected = self._selected(gates, own, self.top_k[kind])
            if self.routing == "union":
                filled = F.pad(selected, (0, 0, 0, -grid.num_video_tokens % self.query_block_size))
                selected = filled.unflatten(2, (-1, self.query_block_size)).any(3)
            visible.append(layout.visible(selected))
        sizes = grid.num_tokens, self.query_block_size, self.key_block_size
        return AttentionPlan(layout.order, BlockMask.from_visible(torch.cat(visible, dim=1), *sizes))

    def _gates(self, query: Tensor, key: Tensor, layout: _Layout) -> Tensor:
        """Gates [B, H, N, C] of N query blocks or tokens and C chunks, of query and key [B, H, S, D]."""
        chunks, longest = layout.members.shape
        keys = key.index_select(2, layout.members.flatten()).unflatten(2, (chunks, longest))
        keys = keys.float().masked_fill(layout.is_filling[:, :, None], 0.0)
        centres = keys.sum(3) / layout.lengths[:, None]  # [B, H, C, D]
        queries = layout.order.apply(query)[:, :, : len(layout.chunk_of_token)]
        queries = block_means(queries, self.query_block_size)[0] if self.routing == "mean" else queries.float()
        return queries @ centres.transpose(-1, -2)

    def _selected(self, gates: Tensor, own: Tensor, top_k: int) -> Tensor:
        """What gates [B, H, N, C] select where own [N, C] is so in any case: [B, H, N, C] bool."""
        rows, number = gates, top_k
        if self.scope == "head-global":
            rows, own, number = gates.flatten(-2), own.flatten(), top_k * gates.shape[-2]
        if self.select == "threshold":
            return best_by_threshold(rows, own, self.threshold).view_as(gates)
        return best_by_number(rows, own, number).view_as(gates)


@dataclass(frozen=True, eq=False)
class _Layout:
    """What depends on the grid, the chunks and the block sizes alone. C chunks, V video tokens.

    Attributes:
        order: chunk after chunk, text last.
        members: the tokens of each chunk, [C, longest], filled up with any token; `is_filling` [C, longest] bool.
        lengths: tokens of each chunk, [C] float32.
        chunk_of_token: which chunk each video token lies in, in this order, [V] int64.
        own_of_block: which chunks each query block of the video holds tokens of, [ceil(V / query block), C] bool.
        share: of each key block that lies in each chunk, [K, C] float32.
        exact: what is seen in any case, [Q, K] bool.
    """

    order: Permutation
    members: Tensor
    is_filling: Tensor
    lengths: Tensor
    chunk_of_token: Tensor
    own_of_block: Tensor
    share: Tensor
    exact: Tensor

    def own_of_token(self) -> Tensor:
        """Which chunk each video token lies in, [V, C] bool."""
        return self.chunk_of_token[:, None] == torch.arange(len(self.lengths), device=self.lengths.device)

    def visible(self, selected: Tensor) -> Tensor:
        """The block map [B, H, Q, K] of the chunks selected by the query blocks of the video, [B, H, N, C] bool."""
        seen = selected.float() @ self.share.T >= 0.5
        return F.pad(seen, (0, 0, 0, len(self.exact) - seen.shape[2])) | self.exact


@functools.lru_cache(maxsize=32)
def _layout(
    grid: TokenGrid, tile: tuple[int, int, int], query_block_size: int, key_block_size: int, device: torch.device
) -> _Layout:
    order = tile_order(grid, tile)
    chunk_of_token = tile_of_token(grid, tile).sort().values  # in this order
    lengths = torch.bincount(chunk_of_token)
    within = torch.arange(int(lengths.max()))
    is_filling = within >= lengths[:, None]
    place = (lengths.cumsum(0) - lengths)[:, None] + within.where(~is_filling, 0)
    tokens_of_block = block_token_counts(grid.num_tokens, key_block_size)[0]
    in_chunk = _tokens_in_chunk(chunk_of_token, key_block_size)
    share = F.pad(in_chunk, (0, 0, 0, len(tokens_of_block) - len(in_chunk))).float() / tokens_of_block[:, None]
    return _Layout(
        order=Permutation(order[None].to(device)),
        members=order[place].to(device),
        is_filling=is_filling.to(device),
        lengths=lengths.float().to(device),
        chunk_of_token=chunk_of_token.to(device),
        own_of_block=(_tokens_in_chunk(chunk_of_token, query_block_size) > 0).to(device),
        share=share.to(device),
        exact=exact_blocks(grid, query_block_size, key_block_size).to(device),
    )


def _tokens_in_chunk(chunk_of_token: Tensor, block_size: int) -> Tensor:
    """How many video tokens of each block lie in each chunk, [blocks, C] int64, from chunk_of_token [V]."""
    block, chunks = torch.arange(len(chunk_of_token)) // block_size, int(chunk_of_token[-1]) + 1
    return torch.bincount(block * chunks + chunk_of_token, minlength=(int(block[-1]) + 1) * chunks).view(-1, chunks)

"""DraftAttention (arXiv:2505.14708): a draft of the attention map, made of patches, says where it matters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_layout import block_layout
from diffsparse.strategies.option_checks import check_block_sizes, check_density, check_sides
from diffsparse.strategies.pooled_scores import pooled_scores
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.top_blocks import top_blocks


@dataclass(frozen=True)
class DraftAttention:
    """Each head keeps the largest entries of its draft map, wherever they are: busy rows get more blocks than others.

    The draft is the softmax between mean queries and mean keys of patches of a frame, which are contiguous and, in
    the published setting, exactly blocks: 8 x 16 tokens in blocks of 128, on grids whose sides they divide. Elsewhere
    patches at the far sides are smaller, blocks straddle neighbouring patches, and the draft is made of blocks, so
    that what is judged is what is executed. Its share is taken of the map of video blocks; text comes on top.

    Two things are other than published: a query block always sees itself, within the share, where the published
    choice can leave it nothing at all; and any grid will do. Published with the first quarter of the steps dense.

    Args:
        density: share of the draft map to keep, 0–1.
        patch: height and width of a patch, in tokens.
        query_block_size, key_block_size: tokens a block.

    Raises:
        ValueError: an option out of its range.
    """

    density: float = 0.25
    patch: tuple[int, int] = (8, 16)
    query_block_size: int = 128
    key_block_size: int = 128

    def __post_init__(self) -> None:
        check_density(self.density)
        check_sides("patch", self.patch, (8, 16))
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        blocks = self.query_block_size, self.key_block_size
        layout = block_layout(call.grid, *blocks, query.device, tile=(1, *self.patch))
        scores = pooled_scores(layout.ordered(query), layout.ordered(key), *blocks, scale=call.scale)
        # Text is seen anyhow, and takes no part, padded or not.
        video = slice(layout.free_queries), slice(layout.free_keys)
        draft = scores[..., video[0], video[1]].softmax(-1)
        count = round(self.density * layout.free_queries * layout.free_keys)
        kept = top_blocks(draft.flatten(-2), count, layout.always[video].flatten())
        visible = layout.always.expand(scores.shape).clone()
        visible[..., video[0], video[1]] = kept.view(draft.shape)
        return layout.plan(visible)

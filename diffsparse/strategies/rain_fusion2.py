"""RainFusion2.0 (arXiv:2512.24086): the highest pooled scores between windows of a frame, the first frame exact."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_layout import block_layout
from diffsparse.strategies.option_checks import check_block_sizes, check_bools, check_density, check_sides
from diffsparse.strategies.pooled_scores import pooled_scores
from diffsparse.strategies.strategy import AttentionCall
from diffsparse.strategies.top_blocks import top_blocks


@dataclass(frozen=True)
class RainFusion2:
    """Each query block sees the same number of key blocks, those whose mean key scores highest with its mean query.

    The tokens of a frame are ordered by windows, 8 x 8 in the released code, so that a block is two of them. Where
    the windows do not divide a frame, those at the far sides are smaller; the released code puts the rest into strips
    of full width and height instead. As in the released code the chosen blocks are chosen among all key blocks, and
    what is exact comes on top: the executed density is above `density` by what of it was not chosen anyway. The paper
    moves the first frame next to the text, which is done here. The released pooling cuts video and text into blocks
    apart from one another and the kernel does not; here both cut the same blocks.

    The released code advises a density of 0.2 for video and 0.4 for images.

    Args:
        density: share of the key blocks to choose, 0–1, rounded up to a whole block.
        window: height and width of a window, in tokens.
        first_frame: whether the first frame sees all and is seen by all.
        query_block_size, key_block_size: tokens a block.

    Raises:
        ValueError: an option out of its range.
    """

    density: float = 0.2
    window: tuple[int, int] = (8, 8)
    first_frame: bool = True
    query_block_size: int = 128
    key_block_size: int = 128

    def __post_init__(self) -> None:
        check_density(self.density)
        check_sides("window", self.window, (8, 8))
        check_bools(first_frame=self.first_frame)
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        blocks = self.query_block_size, self.key_block_size
        layout = block_layout(call.grid, *blocks, query.device, tile=(1, *self.window), first_frame=self.first_frame)
        scores = pooled_scores(
            layout.ordered(query), layout.ordered(key), *blocks, key_length=call.key_length, scale=call.scale
        )
        count = math.ceil(self.density * scores.shape[-1])
        return layout.plan(top_blocks(scores, count) | layout.always)

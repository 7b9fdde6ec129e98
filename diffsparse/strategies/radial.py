"""Radial attention (arXiv:2506.19852): what a frame sees of another one shrinks with the time between them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.block_mask import num_blocks
from diffsparse.grid import TokenGrid
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.block_layout import block_layout
from diffsparse.strategies.option_checks import check_block_sizes, check_bools, check_number
from diffsparse.strategies.strategy import AttentionCall


@dataclass(frozen=True)
class Radial:
    """One static mask for all heads, layers and steps: a band around the same place, narrower the farther the frame.

    A frame sees itself and its neighbours whole. Of a frame 2 to 3, 4 to 7, 8 to 15 ... frames away it sees the tokens
    within `decay` times a quarter, an eighth, a sixteenth ... of the next power of two above the tokens of a frame,
    but no band is narrower than a block: instead, once the undecayed width falls below a block, only every second,
    fourth ... frame is seen. So the released code; the paper has no `decay` and rounds differently.

    From tokens to blocks by the released rule: a block pair is computed if, of the key tokens that any of its queries
    sees, more than six tenths are seen by more than a third of them. The frames' lengths need not be multiples of a
    block. The released code means to compute the first and the last row of blocks whole and does not; so do its
    published results, and so does this. Its mask is also kept for the first resolution that a process meets; here
    each grid has its own. Of 18 x 48 x 80 tokens (Wan 2.1, 768p) the rule for tokens keeps 0.269, the blocks 0.287; of
    21 x 45 x 80 (720p) 0.245 and 0.262; of 30 x 48 x 80 with HunyuanVideo's settings 0.259 and 0.275.

    Published settings: Wan 2.1 `decay=0.2`, a quarter of the steps dense; Wan 2.2 0.8; HunyuanVideo
    `Radial(decay=0.95, first_frame=False)`.

    Args:
        decay: width of the bands, above 0; 1 for a band that reaches half the frame's tokens at distance 2.
        first_frame: whether the first frame is seen whole by every query.
        query_block_size, key_block_size: tokens a block; the larger one is the least width of a band.

    Raises:
        ValueError: an option out of its range.
    """

    decay: float = 0.2
    first_frame: bool = True
    query_block_size: int = 128
    key_block_size: int = 128

    def __post_init__(self) -> None:
        check_number("decay", self.decay, 0, 100)
        check_bools(first_frame=self.first_frame)
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        return _plan(call.grid, self, query.device)


@functools.lru_cache(maxsize=16)
def _plan(grid: TokenGrid, options: Radial, device: torch.device) -> AttentionPlan:
    layout = block_layout(grid, options.query_block_size, options.key_block_size, device)
    widths = torch.tensor([_width(distance, grid.height * grid.width, options) for distance in range(grid.frames)])
    rows = range(num_blocks(grid.num_video_tokens, options.query_block_size))
    visible = torch.stack([_visible_row(block, widths, grid, options) for block in rows]).to(device)
    # Below them stand the blocks of text alone, which see everything.
    visible = F.pad(visible, (0, 0, 0, len(layout.always) - len(visible))) | layout.always
    return layout.plan(visible[None, None])


def _width(distance: int, frame_tokens: int, options: Radial) -> int:
    """Tokens to either side of its own place that a query sees of a frame at this distance; -1 for none."""
    if distance <= 1:
        return frame_tokens
    block = max(options.query_block_size, options.key_block_size)
    undecayed = 2.0 ** (frame_tokens.bit_length() - distance.bit_length())
    if undecayed < block and distance % int(block / undecayed):
        return -1
    return int(max(undecayed * options.decay, block))


def _visible_row(block: int, widths: Tensor, grid: TokenGrid, options: Radial) -> Tensor:
    """The key blocks that a query block sees, text aside: [K] bool."""
    length = grid.height * grid.width
    first = block * options.query_block_size
    queries = torch.arange(first, min(first + options.query_block_size, grid.num_video_tokens))[:, None]
    frames = torch.arange(grid.frames)
    width = widths[(queries // length - frames).abs()]  # [rows, F]
    if options.first_frame:
        width[:, 0] = length
    begin = (queries % length - width).clamp(min=0) + frames * length
    end = (queries % length + width + 1).clamp(max=length) + frames * length
    # How many queries see each key: one more from where a band begins, one less from where it ends.
    places = num_blocks(grid.num_tokens, options.key_block_size) * options.key_block_size
    begins, ends = (torch.bincount(place[width >= 0], minlength=places + 1) for place in (begin, end))
    seen = (begins - ends)[:-1].cumsum(0).view(-1, options.key_block_size)  # [K, tokens of a block]
    return (3 * seen > len(queries)).sum(-1) > 0.6 * (seen > 0).sum(-1)

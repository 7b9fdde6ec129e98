"""RainFusion: spatial, temporal or textural, by how much attention a band holds among sampled tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.heads import HeadClass
from diffsparse.permutation import axis_order
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.always_exact import exact_blocks, first_exact_place, first_frame_last
from diffsparse.strategies.bands import band, half_width
from diffsparse.strategies.fixed_masks import FixedMasks
from diffsparse.strategies.option_checks import (
    check_block_sizes,
    check_bools,
    check_choice,
    check_density,
    check_integers,
    check_shares,
)
from diffsparse.strategies.strategy import AttentionCall

RULES = ("three-way", "two-way")


@dataclass(frozen=True)
class RainFusion:
    """Each head sees a band through time, a band through space, or a checkerboard of keys.

    RainFusion, arXiv:2505.21036, algorithm 1 and equations 4 to 6. A band is judged by its recall: the share of the
    attention among some tokens that falls into it. For the temporal band, in token-major order, these are the tokens
    of one frame, the second; for the spatial band, in frame-major order, every n-th token of n frames. The rules:

    - "three-way", the paper's: temporal where that recall reaches `alpha`, else spatial where that one does, else
      textural: every query sees the keys of a checkerboard, (row - column) a multiple of `stride`.
    - "two-way", the released code's: temporal where the recall is above `alpha` or above that of the spatial band,
      else spatial.

    Text and the first frame see all and are seen by all; they stand outside the bands, moved to the end.

    The paper leaves open which `alpha` it takes (0.9 is that of RainFusion+, the released code has 0.95 for its own
    rule), whether the checkerboard is the same in every frame, and how RainFusion+ goes from recall to class: here
    the smallest band that reaches `alpha` wins, the temporal one before the spatial one. It holds all queries of the
    sampled tokens against their keys; here that is one query in each of `sampled_rows` equal stretches. A head has
    one class for the whole batch. Bands and checkerboard end within a block, which is seen when half of it would be.

    Args:
        density: share of the token pairs outside text and first frame that a band keeps, 0–1; 0.5 is the paper's,
            0.36 the released code's.
        rule: "three-way" or "two-way".
        alpha: the recall that is enough for a band.
        stride: of the checkerboard; 2 keeps half of the keys, 3 a third.
        alternate: whether the checkerboard moves on by one from frame to frame.
        bandwidths: RainFusion+: how far bands reach to either side as shares of the sequence, of which each head takes
            the smallest that will do, instead of one by `density`. The paper's are (0.125, 0.25, 0.5).
        band_multiple: bands are rounded down to a multiple of this many tokens, temporal ones of this many places.
            1 does not round; the released code has 128, which leaves nothing of the bands of small videos.
        sampled_rows: queries a head that the recall is taken over.
        query_block_size, key_block_size: tokens a block.

    Raises:
        ValueError: an option out of its range, or `bandwidths` for the rule that knows none.
    """

    density: float = 0.5
    rule: str = "three-way"
    alpha: float = 0.9
    stride: int = 2
    alternate: bool = False
    bandwidths: tuple[float, ...] | None = None
    band_multiple: int = 1
    sampled_rows: int = 64
    query_block_size: int = 64
    key_block_size: int = 64

    def __post_init__(self) -> None:
        check_density(self.density)
        check_choice("rule", self.rule, RULES)
        check_shares(alpha=self.alpha)
        check_bools(alternate=self.alternate)
        check_integers(1, stride=self.stride, band_multiple=self.band_multiple, sampled_rows=self.sampled_rows)
        check_block_sizes(query_block_size=self.query_block_size, key_block_size=self.key_block_size)
        if self.bandwidths is None:
            return
        if not isinstance(self.bandwidths, tuple) or not self.bandwidths:
            raise ValueError(f"`bandwidths` must be None or a tuple like (0.125, 0.25, 0.5), got {self.bandwidths!r}.")
        for bandwidth in self.bandwidths:
            check_shares(bandwidths=bandwidth)
        if self.rule == "two-way":
            raise ValueError(
                f"`bandwidths` must be None for the rule 'two-way', which always takes a band, got {self.bandwidths}. "
                f"Say rule='three-way', or density."
            )

    def plan(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> AttentionPlan:
        """The plan of a layer; see `Strategy.plan`."""
        layout = _layout(call.grid, self, query.device)
        scale = call.scale_of(query)
        temporal = _recalls(query, key, layout.one_frame, layout, scale)  # [W, H]
        spatial = _recalls(query, key, layout.every_frame, layout, scale)
        if self.rule == "two-way":
            chosen = torch.where((temporal > self.alpha) | (temporal > spatial), 0, 1)[0]
        else:
            enough = torch.stack([temporal, spatial], dim=1).flatten(0, 1) >= self.alpha  # [2 W, H]
            # The first mask that is enough; after the bands the checkerboard, which always is.
            chosen = torch.cat([enough, torch.ones_like(enough[:1])]).byte().argmax(0)
        return layout.masks.plan(chosen, layout.classes.index_select(0, chosen))

    def masks(self, grid: TokenGrid, device: torch.device | str = "cpu") -> FixedMasks:
        """The masks of a grid: temporal and spatial for each bandwidth, the narrowest first, and the textural one."""
        return _layout(grid, self, torch.device(device)).masks


@dataclass(frozen=True, eq=False)
class _Layout:
    """What depends on the grid and the options alone.

    Attributes:
        masks: as `RainFusion.masks` says.
        classes: the head class of each mask, [N] int64.
        one_frame, every_frame: tokens among which a temporal and a spatial band is judged, [L], L tokens a frame.
        rows: which of these are queries, [R].
        in_band: for each bandwidth, which of these each query has in its band, [W, R, L] float32.
    """

    masks: FixedMasks
    classes: Tensor
    one_frame: Tensor
    every_frame: Tensor
    rows: Tensor
    in_band: Tensor


def _recalls(query: Tensor, key: Tensor, tokens: Tensor, layout: _Layout, scale: float) -> Tensor:
    """Share of the attention among `tokens` [L] that each band holds, by head: [W, H]."""
    queries = query.index_select(2, tokens.index_select(0, layout.rows)).float()
    keys = key.index_select(2, tokens).float()
    attention = torch.softmax(queries @ keys.transpose(-1, -2) * scale, dim=-1)  # [B, H, R, L]
    return torch.stack([(attention * in_band).sum(-1).mean((0, 2)) for in_band in layout.in_band])


@functools.lru_cache(maxsize=16)
def _layout(grid: TokenGrid, options: RainFusion, device: torch.device) -> _Layout:
    sizes = (options.query_block_size, options.key_block_size)
    frame_tokens = grid.height * grid.width
    frames = max(1, grid.frames - 1)  # without the first, which is exact
    video = first_exact_place(grid, first_frame=True)
    bandwidths = sorted(options.bandwidths or [half_width(options.density, 1)])

    orders = [first_frame_last(grid, axis_order(grid, axes)) for axes in (_TOKEN_MAJOR, _FRAME_MAJOR)]
    places = torch.arange(grid.num_tokens).double()
    places[video:] = torch.nan
    exact = exact_blocks(grid, *sizes, first_frame_queries=True, first_frame_keys=True)
    masks, classes = [], []
    for bandwidth in bandwidths:
        reach = (
            frames * _round_down(bandwidth * frame_tokens, options.band_multiple),
            _round_down(bandwidth * frames * frame_tokens, options.band_multiple),
        )
        masks += [(number, band(places, places, reach[number], *sizes) | exact) for number in range(2)]
        classes += [HeadClass.TEMPORAL, HeadClass.SPATIAL]
    key_orders = None
    if options.rule == "three-way":
        key_order, kept = _checkerboard_first(grid, orders[1], video, options)
        key_orders = torch.stack([*orders, key_order])
        orders.append(orders[1])
        textural = exact_blocks(grid, *sizes, first_frame_queries=True, first_frame_keys=True, own_place=False)
        textural[:, : max(1, int(kept / options.key_block_size + 0.5))] = True
        masks.append((2, textural))
        classes.append(HeadClass.TEXTURAL)

    sampled = torch.arange(frame_tokens)
    first_token = grid.text_before + (frame_tokens if grid.frames > 1 else 0)
    count = min(options.sampled_rows, frame_tokens)
    rows = torch.arange(count) * frame_tokens // count
    distance = (rows[:, None] - sampled).abs()
    in_band = torch.stack([distance <= int(frame_tokens * bandwidth) for bandwidth in bandwidths])
    return _Layout(
        masks=FixedMasks.of(torch.stack(orders), masks, *sizes, device, key_orders),
        classes=torch.tensor(classes, device=device),
        one_frame=(first_token + sampled).to(device),
        every_frame=(first_token + sampled * frames).to(device),
        rows=rows.to(device),
        in_band=in_band.float().to(device),
    )


_TOKEN_MAJOR = ("height", "width", "frame")
_FRAME_MAJOR = ("frame", "height", "width")


def _round_down(tokens: float, multiple: int) -> int:
    # A product like 0.2 x 3600 may fall short of the whole number that it means.
    return int(tokens / multiple + 1e-9) * multiple


def _checkerboard_first(grid: TokenGrid, order: Tensor, video: int, options: RainFusion) -> tuple[Tensor, int]:
    """The order [S], frame-major, with the keys of the checkerboard before the rest of the video; how many they are."""
    token = order[:video] - grid.text_before
    frame_tokens = grid.height * grid.width
    frame, place = token // frame_tokens, token % frame_tokens
    colour = place // grid.width - place % grid.width + (frame if options.alternate else 0)
    is_kept = colour % options.stride == 0
    return torch.cat([order[:video][is_kept], order[:video][~is_kept], order[video:]]), int(is_kept.sum())

"""Rules of strategies written out plainly, one token and one row at a time, for tests to compare with."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.grid import TokenGrid
from diffsparse.plan import AttentionPlan
from diffsparse.strategies.strategy import AttentionCall


def random_qkv(grid: TokenGrid, batch: int = 1, heads: int = 3, dim: int = 24, seed: int = 0) -> list[Tensor]:
    """Query, key and value, [B, H, S, D] each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, grid.num_tokens, dim, generator=generator) for _ in range(3)]


def qkv_of_groups() -> tuple[TokenGrid, list[Tensor]]:
    """Query, key and value of eight groups of tokens, scattered over the grid, of which each attends to one other."""
    grid = TokenGrid(8, 8, 8)
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(512)[torch.randperm(512, generator=generator)] % 8
    axes = 9 * torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q
    query, key = axes[group][None, None], axes[(group + 3) % 8][None, None]
    return grid, [query, key, torch.randn(1, 1, 512, 24, generator=generator)]


def qkv_of_labels(
    labels: list[Tensor], text: tuple[int, int] = (0, 0), length: float = 6.0, seed: int = 0
) -> list[Tensor]:
    """Query, key and value [1, H, S, 48] of heads in which video tokens of one label [V] attend to one another.

    So many text tokens before and after the video attend to anything. Queries and keys have about this length.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = []
    for label in labels:
        axes = length * torch.linalg.qr(torch.randn(48, 48, generator=generator)).Q
        directions = F.pad(axes[label], (0, 0, *text))
        noise = torch.randn(3, len(directions), 48, generator=generator)
        heads.append([directions + 0.3 * noise[0], directions + 0.3 * noise[1], noise[2]])
    return [torch.stack(parts)[None] for parts in zip(*heads)]


def maps_of_the_video(strategy, alone, grid: TokenGrid) -> tuple[Tensor, Tensor]:
    """What blocks of the video see there where the keys of the text behind it do not exist, and `alone` without it."""
    video = dataclasses.replace(grid, text_after=0)
    query, key, value = random_qkv(grid)
    visible = alone.plan(
        *(x[:, :, : video.num_tokens] for x in (query, key, value)), AttentionCall(video)
    ).mask.visible()
    key[:, :, video.num_tokens :] = torch.nan
    length = torch.tensor([video.num_tokens], dtype=torch.int32)
    plan = strategy.plan(query, key, value, AttentionCall(grid, key_length=length))
    return plan.mask.visible()[..., : visible.shape[2], : visible.shape[3]], visible


def blocks_of(order: list[int], size: int) -> list[list[int]]:
    """The tokens of each block."""
    return [order[first : first + size] for first in range(0, len(order), size)]


def frame_major(grid: TokenGrid) -> list[int]:
    """The tokens as they are, but for text in front, which goes behind the video."""
    video = range(grid.text_before, grid.text_before + grid.num_video_tokens)
    return [*video, *range(grid.text_before), *range(video.stop, grid.num_tokens)]


def is_text(token: int, grid: TokenGrid) -> bool:
    return not grid.text_before <= token < grid.text_before + grid.num_video_tokens


def always(queries: list[list[int]], keys: list[list[int]], grid: TokenGrid) -> list[list[bool]]:
    """Pairs of blocks that hold text, or a token in common. For key blocks that are no larger than query blocks."""
    return [[any(is_text(token, grid) for token in q + k) or bool(set(q) & set(k)) for k in keys] for q in queries]


def fewest(mass: list[float], share: float, kept: list[bool]) -> list[bool]:
    """What is kept, and of the rest the largest until all of it together reaches the share."""
    kept = list(kept)
    for index in sorted(range(len(mass)), key=lambda index: -mass[index]):
        if any(kept) and sum(m for m, k in zip(mass, kept) if k) >= share * sum(mass):
            break
        kept[index] = True
    return kept


def highest(scores: list[float], count: int, kept: list[bool]) -> list[bool]:
    """What is kept, and of the rest the largest until there are `count`."""
    kept = list(kept)
    for index in sorted(range(len(scores)), key=lambda index: -scores[index]):
        if sum(kept) >= count:
            break
        kept[index] = True
    return kept


def visible_of(plan: AttentionPlan, batch: int = 0, head: int = 0) -> list[list[bool]]:
    """The block map of one head, [Q][K]."""
    visible = plan.mask.visible()
    return visible[batch % visible.shape[0], head % visible.shape[1]].tolist()


def order_of(plan: AttentionPlan, grid: TokenGrid) -> list[int]:
    """The order of the tokens, the same for all heads."""
    return list(range(grid.num_tokens)) if plan.permutation is None else plan.permutation.order[0].tolist()

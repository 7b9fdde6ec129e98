"""What `diffsparse eval strategies` compares: every published method, the default, and random blocks.

All have blocks of 64 tokens, and tiles, windows and patches of as many, so that none is coarser than another and those
that are published with whole blocks have them. Other options are the defaults but where said. A strategy that is not
named here is compared by its `density`.
"""

from __future__ import annotations

import dataclasses
from statistics import NormalDist
from typing import Any

import diffsparse
from diffsparse.eval.dials import Row
from diffsparse.eval.named_config import exported_strategies
from diffsparse.heads import HeadClass
from diffsparse.strategies.adaptive import Adaptive, Candidate

REFERENCE = "Adaptive"
"""The row that the others are held against."""

RANDOM = (Candidate(HeadClass.TEXTURAL, "frame-major", "random"),)
BLOCKS: dict[str, Any] = {"query_block_size": 64, "key_block_size": 64}

# Windows of tiles, the smallest first: as near to a cube as they can be, time the first to grow.
WINDOWS = tuple(
    sorted(
        ((t, h, w) for t in range(1, 17) for h in range(1, 9) for w in (h, h + 1) if abs(t - h) <= 1),
        key=lambda window: (window[0] * window[1] * window[2], window),
    )
)


def _window_at(position: float) -> tuple[int, int, int]:
    return WINDOWS[round(position * (len(WINDOWS) - 1))]


def _stride_at(position: float) -> int:
    return round(1 / position)


def _tau_at(position: float) -> float:
    """The threshold that this share of normal scores is above, where it is not below their mean."""
    return max(0.0, NormalDist().inv_cdf(1 - min(position, 0.5)))


NAMED = (
    Row(REFERENCE, Adaptive(**BLOCKS)),
    Row("random blocks", Adaptive(candidates=RANDOM, equal_heads=True, front_load=0.0, **BLOCKS)),
    Row("DraftAttention", diffsparse.DraftAttention(patch=(8, 8), **BLOCKS)),
    Row("FlexPrefill", diffsparse.FlexPrefill(block_size=64), "mass"),
    # Blocks that touch are 24 % of so small a grid, and the window of NABLA is 54 %.
    Row("Jenga", diffsparse.Jenga(neighbours=False, **BLOCKS)),
    Row("MInference", diffsparse.MInference(block_size=64)),
    Row("NABLA", diffsparse.NABLA(window=None, **BLOCKS), "mass"),
    Row("Radial", diffsparse.Radial(**BLOCKS), "decay"),
    # The released code's rule: the checkerboard of the paper's keeps half of the keys, whatever the density.
    Row("RainFusion", diffsparse.RainFusion(rule="two-way", **BLOCKS)),
    Row("RainFusion2", diffsparse.RainFusion2(window=(8, 8), **BLOCKS)),
    # With the default neighbourhood of eight blocks to either side, no stride reaches 0.1 of a few thousand tokens.
    Row("S2Attention", diffsparse.S2Attention(local_blocks=2, block_size=64), "stride", _stride_at),
    # So that window and columns fit into 0.1.
    Row("SampleAttention", diffsparse.SampleAttention(window=0.05, block_size=64), "mass"),
    Row("SlidingTile", diffsparse.SlidingTile(tile=(4, 4, 4), **BLOCKS), "window", _window_at),
    Row("SolAttention", diffsparse.SolAttention(**BLOCKS), "tau", _tau_at),
    # The released function that goes by density; the other one keeps all blocks whose tokens differ among themselves.
    Row("SpargeAttention", diffsparse.SpargeAttention(density=0.5, similarity=-0.1, **BLOCKS)),
    # By the relative error, or the scale of a model's values would decide.
    Row("SparseVDiT", diffsparse.SparseVDiT(relative=True, **BLOCKS)),
    Row("SVG2", diffsparse.SVG2(**BLOCKS), "mass"),
    # With less for their mass than released, and SVOO with the lower of its released bounds, so that 0.1 is reached.
    Row("SVGEAR", diffsparse.SVGEAR(least=0.025, **BLOCKS), "mass"),
    Row("SVOO", diffsparse.SVOO(least=0.05, most=0.1, **BLOCKS), "mass"),
    Row("VMoBA", diffsparse.VMoBA(**BLOCKS), "threshold"),
    Row("XAttention", diffsparse.XAttention(**BLOCKS), "mass"),
)


def _others() -> tuple[Row, ...]:
    named = {diffsparse.Dense, *(type(row.strategy) for row in NAMED)}
    sizes = BLOCKS | {"block_size": 64}
    return tuple(
        Row(
            each.__name__,
            each(**{field.name: sizes[field.name] for field in dataclasses.fields(each) if field.name in sizes}),
        )
        for each in exported_strategies().values()
        if each not in named
    )


ROWS = (*NAMED, *_others())

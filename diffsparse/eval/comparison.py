"""How close two videos are, frame by frame, read a window of frames at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffsparse.eval.flicker import Flicker
from diffsparse.eval.lpips_metric import Lpips, NoLpips, lpips_for
from diffsparse.eval.metrics import MS_SSIM_SMALLEST_SIDE, Frames, FrameScores, psnr_db, ssim, ssim_and_ms_ssim
from diffsparse.eval.video_io import read_frames

# Frames held at once of each video: bounds the memory, whatever their number.
WINDOW = 8


@dataclass(frozen=True)
class Comparison:
    """How close two videos are. In place of a metric that there is not stands why.

    Flicker has a score for each two frames that follow each other, the first for frames 0 and 1.
    """

    num_frames: int
    height: int
    width: int
    psnr_db: FrameScores
    ssim: FrameScores
    ms_ssim: FrameScores | str
    lpips: FrameScores | str
    lpips_net: str
    flicker: FrameScores | str

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {name: x.as_dict() if isinstance(x, FrameScores) else x for name, x in vars(self).items()}

    def rows(self) -> list[tuple[str, str, str]]:
        """Metric, mean and worst frame, in words, for a table. Why LPIPS is missing does not fit in one: `notes`."""
        return [
            ("PSNR (dB, higher is closer)", *_mean_and_worst(self.psnr_db, ".2f")),
            ("SSIM (1 is equal)", *_mean_and_worst(self.ssim, ".4f")),
            ("MS-SSIM (1 is equal)", *_mean_and_worst(self.ms_ssim, ".4f")),
            (f"LPIPS, {self.lpips_net} (0 is equal)", *_mean_and_worst(self.lpips, ".4f")),
            ("flicker (0 is equal)", *_mean_and_worst(self.flicker, ".4f")),
        ]

    def notes(self) -> list[str]:
        """What a reader of the rows has to know besides."""
        notes = []
        identical = self.psnr_db.num_identical
        if 0 < identical < self.num_frames:
            notes.append(f"{identical} of {self.num_frames} frames are exactly equal, and left out of the mean PSNR.")
        named = {"MS-SSIM": self.ms_ssim, "LPIPS": self.lpips, "Flicker": self.flicker}
        return notes + [f"{name} {scores}." for name, scores in named.items() if isinstance(scores, str)]


def compare(windows: Iterable[tuple[Frames, Frames]], lpips: Lpips | NoLpips) -> Comparison:
    """Score two videos given in windows of frames [F, H, W, 3]."""
    psnr_scores: list[float] = []
    ssim_scores: list[float] = []
    ms_ssim_scores: list[float] = []
    lpips_scores: list[float] = []
    flicker_scores: list[float] = []
    flicker = Flicker()
    height = width = 0
    for a, b in windows:
        height, width = a.shape[1:3]
        lpips = lpips_for(lpips, height, width)
        psnr_scores += psnr_db(a, b)
        flicker_scores += flicker(a, b)
        if min(height, width) >= MS_SSIM_SMALLEST_SIDE:
            both = ssim_and_ms_ssim(a, b)
            ssim_scores += both[0]
            ms_ssim_scores += both[1]
        else:
            ssim_scores += ssim(a, b)
        if not isinstance(lpips, NoLpips):
            lpips_scores += lpips(a, b)
    return Comparison(
        num_frames=len(psnr_scores),
        height=height,
        width=width,
        psnr_db=FrameScores(tuple(psnr_scores), higher_is_better=True),
        ssim=FrameScores(tuple(ssim_scores), higher_is_better=True),
        lpips=lpips.reason if isinstance(lpips, NoLpips) else FrameScores(tuple(lpips_scores), higher_is_better=False),
        lpips_net=lpips.net,
        ms_ssim=FrameScores(tuple(ms_ssim_scores), higher_is_better=True)
        if ms_ssim_scores
        else f"n/a: it needs frames of at least {MS_SSIM_SMALLEST_SIDE} pixels a side, got {width} × {height}",
        flicker=FrameScores(tuple(flicker_scores), higher_is_better=False)
        if flicker_scores
        else "n/a: one frame has no change from frame to frame",
    )


def windows_of(a: Path, b: Path) -> Iterator[tuple[Frames, Frames]]:
    """Two videos side by side, a window of frames at a time.

    Raises:
        ValueError: different sizes or lengths, or a file that cannot be read.
    """
    pairs = _pairs(a, b)
    while window := list(itertools.islice(pairs, WINDOW)):
        yield np.stack([first for first, _ in window]), np.stack([second for _, second in window])


def _pairs(a: Path, b: Path) -> Iterator[tuple[Any, Any]]:
    frames_a, frames_b = read_frames(a), read_frames(b)
    size = None
    for index, (first, second) in enumerate(itertools.zip_longest(frames_a, frames_b)):
        if first is None or second is None:
            length_a = index + sum(1 for _ in frames_a) + (first is not None)
            length_b = index + sum(1 for _ in frames_b) + (second is not None)
            raise ValueError(
                f"The videos differ in length: {a} has {length_a} frames, {b} has {length_b}. "
                "They are compared frame by frame: cut the longer one first."
            )
        size = size or first.shape
        for path, frame in ((a, first), (b, second)):
            if frame.shape != size:
                raise ValueError(
                    f"The sizes differ: frame 0 of {a} is {size[1]} × {size[0]} (width × height), "
                    f"frame {index} of {path} is {frame.shape[1]} × {frame.shape[0]}. "
                    "They are compared pixel by pixel: scale one of them first."
                )
        yield first, second


def _mean_and_worst(scores: FrameScores | str, digits: str) -> tuple[str, str]:
    if isinstance(scores, str):
        return "n/a", "see below"
    return in_words(scores.mean, digits), f"{in_words(scores.worst, digits)} (frame {scores.worst_frame})"


def in_words(score: float, digits: str) -> str:
    """A score for people to read."""
    if math.isnan(score):
        return "not a number"
    return "infinite (equal)" if math.isinf(score) else format(score, digits)

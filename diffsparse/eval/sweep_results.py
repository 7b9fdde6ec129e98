"""The scores of many sparse videos in one JSON file, written whole after each, and several such files as one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsparse.eval.json_shape import check_shape
from diffsparse.eval.metrics import as_json
from diffsparse.eval.output_file import reading, write_json
from diffsparse.eval.report_data import as_number


@dataclass(frozen=True)
class Variant:
    """One way to make a sparse video: a row of a table at one of its densities, with or without the pooled tail."""

    row: str
    density: float
    tail: bool

    def __str__(self) -> str:
        return f"{self.row}{' + tail' if self.tail else ''} at {100 * self.density:g} %"


@dataclass(frozen=True)
class Pair:
    """What a sparse video has in common with the dense one that it is held against."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Score:
    """A sparse video against the dense one.

    Attributes:
        psnr_db, ssim: mean over the frames; infinite where all are equal.
        density: measured, of the sparse calls; None where none ran.
        seconds, dense_seconds: of the denoising steps of either.
        lpips: mean over the frames; None where its backbone was not at hand.
    """

    psnr_db: float
    ssim: float
    density: float | None
    seconds: float
    dense_seconds: float
    lpips: float | None = None


_SCORE = (float, str)
SHAPE = {
    "settings": dict,
    "videos": [
        {"prompt": str, "seed": int, "row": str, "at_density": float, "tail": bool, "density": (float, None)}
        | {"psnr_db": _SCORE, "ssim": _SCORE, "lpips": (*_SCORE, None), "seconds": float, "dense_seconds": float}
    ],
}
"""What a file of results must have."""
SETTINGS = {"sampling": str, "dense_steps": float, "device": str}
"""What a table needs of the settings."""


class SweepResults:
    """Scores by pair and variant, and the settings that they were made with."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.scores: dict[tuple[Pair, Variant], Score] = {}

    @classmethod
    def read(cls, file: Path) -> SweepResults:
        """What a file holds.

        Raises:
            ValueError: it is no such file.
        """
        with reading(f"{file} holds no results that can be read", "Name another file."):
            contents = json.loads(file.read_text(encoding="utf-8"))
            # Older files know nothing of LPIPS.
            videos = [{"lpips": None} | video for video in contents["videos"]]
            check_shape(contents | {"videos": videos}, SHAPE, "it")
            results = cls(contents["settings"])
            for video in videos:
                pair = Pair(video["prompt"], video["seed"])
                variant = Variant(video["row"], video["at_density"], video["tail"])
                names = [field.name for field in dataclasses.fields(Score)]
                results.scores[pair, variant] = Score(**{name: as_number(video[name]) for name in names})
        return results

    @classmethod
    def going_on(cls, file: Path, settings: dict[str, Any]) -> SweepResults:
        """Those of an earlier run with the same settings, or none.

        Raises:
            ValueError: the file is from other settings.
        """
        if not file.exists():
            return cls(settings)
        results = cls.read(file)
        if results.settings != settings:
            raise ValueError(f"{file} holds results of other settings{_how(results, settings)}. Name another --output.")
        return results

    @classmethod
    def merged(cls, files: Iterable[Path]) -> SweepResults:
        """Several files as one; of a video in more than one of them, the last counts.

        Raises:
            ValueError: they are from different settings, or there is nothing in them.
        """
        first, *others = files
        results = cls.read(first)
        with reading(f"{first} holds no results that can be shown", "Name another file."):
            check_shape(results.settings, SETTINGS, "settings")
        for file in others:
            other = cls.read(file)
            if other.settings != results.settings:
                raise ValueError(
                    f"{file} and {first} are of different settings{_how(other, results.settings)}. "
                    f"Merge files of one run only."
                )
            results.scores |= other.scores
        if not results.scores:
            raise ValueError(f"There is no video in {', '.join(map(str, files))}. Let the runs make some first.")
        return results

    def add_to(self, file: Path) -> None:
        """Take in what another process has written to the file meanwhile, and write all.

        Raises:
            ValueError: what it has written is from other settings.
        """
        self.scores = SweepResults.going_on(file, self.settings).scores | self.scores
        self.write(file)

    def write(self, file: Path) -> None:
        """Write the file, whole or not at all."""
        videos = [
            vars(pair)
            | {"row": variant.row, "at_density": variant.density, "tail": variant.tail}
            | {name: as_json(x) if isinstance(x, float) else x for name, x in vars(score).items()}
            for (pair, variant), score in self.scores.items()
        ]
        write_json(file, {"settings": self.settings, "videos": videos})

    @property
    def variants(self) -> list[Variant]:
        """All variants of which there is a video, in the order that they were made in."""
        return list(dict.fromkeys(variant for _, variant in self.scores))

    def complete_pairs(self) -> list[Pair]:
        """The prompts and seeds of which every variant has its video: what a table may compare.

        Raises:
            ValueError: there is none yet.
        """
        pairs = dict.fromkeys(pair for pair, _ in self.scores)
        complete = [pair for pair in pairs if all((pair, variant) in self.scores for variant in self.variants)]
        if not complete:
            raise ValueError(
                f"No prompt has its {len(self.variants)} videos yet, so there is nothing to compare. "
                f"Run the command again, and it goes on where it was."
            )
        return complete

    def coverage(self) -> str:
        """How many videos a table of the complete pairs stands on, in words."""
        pairs, complete = {pair for pair, _ in self.scores}, self.complete_pairs()
        prompts, seeds = ({getattr(pair, name) for pair in complete} for name in ("prompt", "seed"))
        left_out = len(pairs) - len(complete)
        return (
            f"Videos a row: {len(complete)}, of prompts: {len(prompts)}, seeds: {', '.join(map(str, sorted(seeds)))}"
            + (f"; {left_out} more left out, which not every row has yet" if left_out else "")
            + f". {self.settings['sampling']}, {self.settings['dense_steps']:g} of the steps dense, "
            f"on {self.settings['device']}."
        )


def _how(results: SweepResults, settings: dict[str, Any]) -> str:
    """Which settings differ, and how where that is short."""
    names = [name for name in settings | results.settings if results.settings.get(name) != settings.get(name)]
    told = []
    for name in names:
        how = f"{results.settings.get(name)} instead of {settings.get(name)}"
        told.append(f"{name}: {how}" if len(how) < 500 else name)
    return f" ({'; '.join(told)})"

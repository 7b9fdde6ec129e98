"""The folder of a run: what it is to hold, what it holds, and who works on what.

    manifest.json               the settings, and every command that worked here, with machine and versions
    dense/000-seed3/00000.png   the frames of the first prompt with seed 3, lossless at 8 bits a channel
    dense/000-seed3.json        the record beside them; with it a video counts as made
    fast/000-seed3/…            the same for each config
    .locks/000-seed3            held by the process that works on this prompt and seed

Any number of processes and machines may share the folder. The system releases the lock of a process that dies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from numpy.typing import NDArray

from diffsparse.eval.json_shape import check_shape
from diffsparse.eval.output_file import reading, write_json
from diffsparse.eval.video_io import images_in, write_images
from diffsparse.whole_file import whole_file

MANIFEST = "manifest.json"
SHAPE = {
    "settings": {
        "configs": {str: {"text": str, "config": str}},
        "prompts": [str],
        "seeds": [int],
        "sampling": dict,
        "model": str,
    },
    "made_by": [dict],
}
"""What a manifest must have: settings, and who worked there."""


@dataclass(frozen=True)
class Pair:
    """A prompt, by its index, and a seed: what is generated once densely and once by each config."""

    prompt: int
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.prompt:03d}-seed{self.seed}"


@dataclass(frozen=True)
class RunFolder:
    """The folder at a path."""

    path: Path

    def frames(self, config: str, pair: Pair) -> Path:
        """The folder of a video's frames."""
        return self.path / config / pair.name

    def record_file(self, config: str, pair: Pair) -> Path:
        """Where what is known of a video stands."""
        return self.path / config / f"{pair.name}.json"

    def record(self, config: str, pair: Pair) -> dict[str, Any] | None:
        """What is known of a video; None where it is not made yet, or where the record is damaged."""
        file = self.record_file(config, pair)
        if not file.is_file() or not self.frames(config, pair).is_dir():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def is_whole(self, config: str, pair: Pair) -> bool:
        """Whether the video is made and its files are those that were written."""
        record = self.record(config, pair)
        return record is not None and record.get("sha256") == _checksum(self.frames(config, pair))

    def add(self, config: str, pair: Pair, frames: NDArray[Any], record: dict[str, Any]) -> None:
        """Keep a video and what is known of it; a kill leaves nothing or all, besides what `remove` clears away."""
        self.remove(config, pair)
        write_images(self.frames(config, pair), frames)
        write_json(self.record_file(config, pair), record | {"sha256": _checksum(self.frames(config, pair))})

    def remove(self, config: str, pair: Pair) -> None:
        """Clear away a video and all that an attempt at it has left. For whoever holds the pair."""
        self.record_file(config, pair).unlink(missing_ok=True)
        self._failure_file(config, pair).unlink(missing_ok=True)
        for folder in (self.frames(config, pair), *self.frames(config, pair).parent.glob(f".{pair.name}.*")):
            if folder.is_dir():
                shutil.rmtree(folder)
            else:
                folder.unlink(missing_ok=True)

    def failure(self, config: str, pair: Pair) -> str | None:
        """Why the last attempt at a video failed; None if it did not."""
        file = self._failure_file(config, pair)
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def note_failure(self, config: str, pair: Pair, reason: str) -> None:
        """Keep why a video could not be made."""
        file = self._failure_file(config, pair)
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as unfinished:
            # It may name a file, and that may have bytes that are no UTF-8.
            unfinished.write_text(reason, "utf-8", "backslashreplace")

    @contextlib.contextmanager
    def claim(self, pair: Pair, wait: bool) -> Iterator[bool]:
        """Whether this process has the pair to itself inside the block; with `wait`, once it has."""
        try:
            held = self._lock(pair.name).acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        with held:
            yield True

    def check(self, settings: dict[str, Any]) -> None:
        """Find out whether `agree` would, and write nothing.

        Raises:
            ValueError: the folder holds results of other settings.
        """
        if (self.path / MANIFEST).is_file():
            _check_agreement(self.path, read_manifest(self.path)["settings"], settings)

    def agree(self, settings: dict[str, Any], made_by: dict[str, Any]) -> None:
        """Write down what the folder is to hold, or find that it agrees with what is written there.

        Seeds and configs may be added to those of an earlier run; all else must be the same.

        Raises:
            ValueError: the folder holds results of other settings.
        """
        with self._lock("manifest"):
            file = self.path / MANIFEST
            if file.is_file():
                self.check(settings)
                found = read_manifest(self.path)
                settings = settings | {
                    "seeds": sorted({*found["settings"]["seeds"], *settings["seeds"]}),
                    "configs": found["settings"]["configs"] | settings["configs"],
                }
                makers = found["made_by"] + ([made_by] if made_by not in found["made_by"] else [])
            else:
                makers = [made_by]
            write_json(file, {"settings": settings, "made_by": makers})

    def _lock(self, name: str) -> FileLock:
        folder = self.path / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / name)

    def _failure_file(self, config: str, pair: Pair) -> Path:
        return self.path / config / f"{pair.name}.failed.txt"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"{folder} is no folder of `diffsparse eval run`: it has no {MANIFEST}.")
    with reading(f"{file} is damaged", "Name another folder."):
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        check_shape(found, SHAPE, "it")
    return found


def _check_agreement(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    pairs = {key: (found.get(key), value) for key, value in wanted.items() if key not in ("seeds", "configs")}
    both = found["configs"].keys() & wanted["configs"].keys()
    pairs |= {f"config {name}": (found["configs"][name], wanted["configs"][name]) for name in sorted(both)}
    for name, (there, now) in pairs.items():
        if there != now:
            raise ValueError(
                f"{folder} holds results of other settings: {name} is {_short(there)} there, {_short(now)} now. "
                f"Name another --output."
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]}…"


def _checksum(folder: Path) -> str:
    digest = hashlib.sha256()
    # Whatever looks at the frames may leave files of its own beside them.
    for file in sorted(images_in(folder)):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()

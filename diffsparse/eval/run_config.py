"""One config of a run: sparse attention, what it is held against, or several of these at once."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffsparse
from diffsparse.config import PLAN_FILE_SUFFIX, PRESETS, SparseAttentionConfig
from diffsparse.eval.baseline import BACKEND_PREFIX, AttentionBackend, Cache, cache_names
from diffsparse.eval.named_config import DENSE, exported_strategies, read_config, read_options

LONGEST_FOLDER_NAME = 150
"""Characters. File systems take 255 bytes."""

NOTHING_FIXED: Mapping[str, Any] = types.MappingProxyType({})

Part = SparseAttentionConfig | AttentionBackend | Cache


@dataclass(frozen=True)
class RunConfig:
    """What is put on the pipeline for a video, and the text that stands for it."""

    text: str
    parts: tuple[Part, ...]

    @property
    def folder(self) -> str:
        """A folder name that tells configs apart as the text does, with nothing that a file name must not have.

        What is too long for one, such as 50 ratios of MagCache, ends in a checksum.
        """
        name = re.sub(r"[^A-Za-z0-9.,=+-]+", "_", self.text)
        if len(name) <= LONGEST_FOLDER_NAME:
            return name
        checksum = hashlib.sha256(self.text.encode()).hexdigest()[:16]
        return f"{name[: LONGEST_FOLDER_NAME - 17]}-{checksum}"

    @property
    def kind(self) -> str:
        """What it is, in words."""
        kinds = ("sparse attention" if isinstance(part, SparseAttentionConfig) else part.kind for part in self.parts)
        return ", ".join(kinds)

    @property
    def has_sparse_attention(self) -> bool:
        """Whether there is a report of what ran sparse."""
        return any(isinstance(part, SparseAttentionConfig) for part in self.parts)

    @contextlib.contextmanager
    def on(self, pipe: Any, num_steps: int, dense_steps: float | None = None) -> Iterator[None]:
        """Put it on a pipeline inside the block, with other `dense_steps` than its own where they are given.

        Raises:
            ValueError: the pipeline cannot have it.
        """
        with contextlib.ExitStack() as stack:
            for part in self.parts:
                if not isinstance(part, SparseAttentionConfig):
                    stack.enter_context(part.on(pipe, num_steps))
                    continue
                # Nothing is timed: processes that share a run could find otherwise, and a slow config is to be seen.
                config = dataclasses.replace(part, min_tokens=part.fewest_tokens)
                if dense_steps is not None:
                    config = dataclasses.replace(config, dense_steps=dense_steps)
                diffsparse.enable_sparse_attention(pipe, config)
                stack.callback(diffsparse.disable_sparse_attention, pipe)
            yield


def read_run_configs(texts: list[str], fixed: Mapping[str, Any] = NOTHING_FIXED) -> list[RunConfig]:
    """The configs of several texts; `fixed` is what every sparse one of them has by a protocol.

    Raises:
        ValueError: a text that cannot be read or goes against the protocol, or two that say the same or need the same
            folder.
    """
    configs = [read_run_config(text, fixed) for text in texts]
    for index, config in enumerate(configs):
        if config.folder.lower() == DENSE:
            raise ValueError(f"--config {config.text}: dense videos are always made, so leave it out.")
        for other in configs[:index]:
            if config.parts == other.parts or config.folder.lower() == other.folder.lower():
                raise ValueError(f"--config {other.text} and {config.text} are the same: leave one out.")
    return configs


def read_run_config(text: str, fixed: Mapping[str, Any] = NOTHING_FIXED) -> RunConfig:
    """The config of a text: what `read_config` reads, `backend:NAME`, a cache as NAME:OPTION=VALUE,…, or some of these
    joined by +.

    Raises:
        ValueError: an unknown name or option, a value that it cannot take, a missing package, two of a kind, or an
            option with another value than its `fixed` one.
    """
    # A + inside of options stands before a digit, as in 1e+3; one in the path of a file stands for itself.
    texts = [text.strip()] if Path(text.partition(":")[0]).is_file() else re.split(r"\+(?=[A-Za-z_./])", text.strip())
    parts = tuple(_read_part(text, part, fixed) for part in texts)
    kinds = [type(part) for part in parts]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"--config {text}: two of a kind cannot be joined by +. Name them one by one.")
    return RunConfig(text.strip(), parts)


def _read_part(text: str, part: str, fixed: Mapping[str, Any]) -> Part:
    name, _, options = part.partition(":")
    caches = cache_names()
    try:
        if part.startswith(BACKEND_PREFIX):
            return AttentionBackend(options)
        if name.lower() in caches:
            return Cache(caches[name.lower()], read_options(text, options))
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(reason if reason.startswith("--config") else f"--config {text}: {reason}") from error
    if name in PRESETS or name.endswith(PLAN_FILE_SUFFIX) or name.lower() in exported_strategies():
        config = read_config(part)
        given = read_options(text, options)
        for option, value in fixed.items():
            if given.get(option, value) != value:
                raise ValueError(
                    f"--config {text}: {option}={given[option]!r} goes against --protocol, which has {value!r}. "
                    f"Leave out one of the two."
                )
        return dataclasses.replace(config, **fixed)
    raise ValueError(
        f"--config {text}: {name!r} is neither a preset ({', '.join(PRESETS)}), nor a strategy "
        f"({', '.join(exported_strategies())}), nor a cache of diffusers ({', '.join(caches)}), nor "
        f"{BACKEND_PREFIX}NAME, an attention backend of diffusers such as {BACKEND_PREFIX}sage."
    )

"""One config of a run: sparse attention, what it is held against, or several of these at once."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsparse.config import PLAN_FILE_SUFFIX, PRESETS, SparseAttentionConfig
from diffsparse.eval.baseline import BACKEND_PREFIX, AttentionBackend, Cache, cache_names
from diffsparse.eval.generate import sparse_attention
from diffsparse.eval.named_config import DENSE, exported_strategies, name_and_options, parse_config, read_options

LONGEST_FOLDER_NAME = 150
"""Characters. File systems take 255 bytes."""

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

    @property
    def quantizes_dense_steps(self) -> bool:
        """Whether its early steps are computed by the kernel as well."""
        return any(isinstance(part, SparseAttentionConfig) and part.dense_quantization for part in self.parts)

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
                stack.enter_context(sparse_attention(pipe, config))
            yield


def read_run_configs(
    texts: Sequence[str], fixed: Mapping[str, Any] = {}, baselines: Sequence[str] = ()
) -> list[RunConfig]:
    """The configs of the baselines and of other texts; `fixed` is what every sparse one of them has by a protocol.

    Raises:
        ValueError: a text that cannot be read or goes against the protocol, or two that say the same or need the same
            folder.
    """
    configs = [read_run_config(text, fixed, "--baseline") for text in baselines]
    configs += [read_run_config(text, fixed) for text in texts]
    for index, config in enumerate(configs):
        if config.folder.lower() == DENSE:
            raise ValueError(f"--config {config.text}: dense videos are always made, so leave it out.")
        for other in configs[:index]:
            if config.parts == other.parts or config.folder.lower() == other.folder.lower():
                raise ValueError(f"--config {other.text} and {config.text} are the same: leave one out.")
    return configs


def read_run_config(text: str, fixed: Mapping[str, Any] = {}, option: str = "--config") -> RunConfig:
    """The config of a text that `option` gives on the command line: what `parse_config` reads, `backend:NAME`, a cache
    as NAME:OPTION=VALUE,…, or some of these joined by +.

    Raises:
        ValueError: an unknown name or option, a value that it cannot take, a missing package, two of a kind, or an
            option with another value than its `fixed` one.
    """
    # A + inside of options stands before a digit, as in 1e+3; one in the path of a file stands for itself.
    texts = (
        [text.strip()] if Path(name_and_options(text)[0]).is_file() else re.split(r"\+(?=[A-Za-z_./])", text.strip())
    )
    try:
        parts = tuple(_read_part(part, fixed) for part in texts)
        if len({type(part) for part in parts}) < len(parts):
            raise ValueError("two of a kind cannot be joined by +. Name them one by one.")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option} {text}: {error}") from error
    return RunConfig(text.strip(), parts)


def _read_part(text: str, fixed: Mapping[str, Any]) -> Part:
    name, options = name_and_options(text)
    caches = cache_names()
    if text.startswith(BACKEND_PREFIX):
        return AttentionBackend(options)
    if name.lower() in caches:
        return Cache(caches[name.lower()], read_options(options))
    if name in PRESETS or name.endswith(PLAN_FILE_SUFFIX) or name.lower() in exported_strategies():
        config = parse_config(text)
        given = read_options(options)
        for option, value in fixed.items():
            if given.get(option, value) != value:
                raise ValueError(
                    f"{option}={given[option]!r} goes against --protocol, which has {value!r}. Leave out one of the "
                    f"two."
                )
        return dataclasses.replace(config, **fixed)
    raise ValueError(
        f"{name!r} is neither a preset ({', '.join(PRESETS)}), nor a strategy ({', '.join(exported_strategies())}), "
        f"nor a cache of diffusers ({', '.join(caches)}), nor {BACKEND_PREFIX}NAME, an attention backend of diffusers "
        f"such as {BACKEND_PREFIX}sage."
    )

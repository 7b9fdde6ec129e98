"""Configs from a YAML file, as the texts that a command line would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

SUFFIXES = (".yaml", ".yml")


def config_texts(texts: list[str]) -> list[str]:
    """The texts, each YAML file among them replaced by what it lists.

    An entry is a text, or a name with its options: `adaptive: {density: 0.2, tile: [2, 4, 8]}` is
    `adaptive:density=0.2,tile=(2, 4, 8)`.

    Raises:
        ValueError: a file that cannot be read, or is not a list of such entries.
    """
    return [text for given in texts for text in (_listed(Path(given)) if given.endswith(SUFFIXES) else [given])]


def _listed(path: Path) -> list[str]:
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    # A ValueError is of a date that there is not, or of text that is no UTF-8; the last of brackets in too many more.
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"--config {path} must be a list of configs, such as `- balanced`, got {entries!r}.")
    return [_text(path, entry) for entry in entries]


def _text(path: Path, entry: Any) -> str:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, dict) and len(entry) == 1:
        (name, options), *_ = entry.items()
        if isinstance(name, str) and isinstance(options, dict) and all(isinstance(key, str) for key in options):
            return f"{name}:{','.join(f'{key}={_value(value)!r}' for key, value in options.items())}"
    raise ValueError(
        f"--config {path}: {entry!r} is no config. Expected a text, such as `- balanced`, or a name with its options, "
        f"such as `- adaptive: {{density: 0.2}}`."
    )


def _value(value: Any) -> Any:
    """As Python has it: options are tuples, not lists."""
    return tuple(map(_value, value)) if isinstance(value, list) else value

"""A config in one word on a command line: `fast`, or `adaptive:density=0.2,dense_steps=0.1`."""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any

import diffsparse
from diffsparse.config import PLAN_FILE_SUFFIX, PRESETS, SparseAttentionConfig, as_config

DENSE = "dense"
"""The name of what every config is compared with."""


def read_config(text: str, option: str = "--config") -> SparseAttentionConfig:
    """What `parse_config` makes of a text that `option` gives on the command line.

    Raises:
        ValueError: it makes nothing of it; the error begins with the option and the text.
    """
    try:
        return parse_config(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option} {text}: {error}") from error


def parse_config(text: str) -> SparseAttentionConfig:
    """The config of NAME or NAME:OPTION=VALUE,…, where NAME is a preset, a strategy that diffsparse exports, or a file
    of plans.

    An option is a field of the strategy or of `SparseAttentionConfig`, a value is written as in Python; quotes around
    a word may be left out.

    Raises:
        TypeError, ValueError: an unknown name or option, or a value that it cannot take.
    """
    name, options = name_and_options(text.strip())
    strategies = exported_strategies()
    if name in PRESETS or name.endswith(PLAN_FILE_SUFFIX):
        config = as_config(name)
    elif name.lower() in strategies:
        config = SparseAttentionConfig(strategies[name.lower()]())
    else:
        raise ValueError(
            f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor a strategy ({', '.join(strategies)})."
        )
    strategy: Any = config.strategy
    values = read_options(options)
    of_config = {field.name for field in dataclasses.fields(config)} - {"strategy"}
    of_strategy = {field.name for field in dataclasses.fields(strategy)}
    unknown = sorted(set(values) - of_config - of_strategy)
    if unknown:
        raise ValueError(
            f"there is no option {unknown[0]!r}. {type(strategy).__name__} has "
            f"{', '.join(sorted(of_strategy)) or 'none'}; every config has {', '.join(sorted(of_config))}."
        )
    strategy = dataclasses.replace(strategy, **{key: values[key] for key in values if key in of_strategy})
    changes = {key: values[key] for key in values if key not in of_strategy}
    return dataclasses.replace(config, strategy=strategy, **changes)


def name_and_options(text: str) -> tuple[str, str]:
    """The two sides of the colon of a config in one word, not that of a drive's letter in Windows."""
    start = 2 if re.match(r"[A-Za-z]:[\\/]", text) else 0
    name, _, options = text[start:].partition(":")
    return text[:start] + name, options


def exported_strategies() -> dict[str, type]:
    """The strategies in `diffsparse` by their class names in small letters."""
    exported = {name: getattr(diffsparse, name) for name in diffsparse.__all__}
    return {name.lower(): c for name, c in exported.items() if isinstance(c, type) and _is_strategy(c)}


def read_options(options: str) -> dict[str, Any]:
    """OPTION=VALUE,… as a dictionary, values as in Python.

    Raises:
        ValueError: they are written in another way.
    """
    try:
        call = ast.parse(f"f({options})", mode="eval").body
        # In f(a=1)(b=2) what is called is no name.
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("a bracket is closed that none opens")
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("every option needs a name")
        return {
            str(k.arg): k.value.id if isinstance(k.value, ast.Name) else ast.literal_eval(k.value)
            for k in call.keywords
        }
    except (SyntaxError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(
            f"the options cannot be read ({reason}); "
            f"expected OPTION=VALUE,… as in adaptive:density=0.2,dense_steps=0.1."
        ) from error


def _is_strategy(cls: type) -> bool:
    if not dataclasses.is_dataclass(cls) or not hasattr(cls, "plan"):
        return False
    # One that has no defaults, as that of a plan file, is not said by its name.
    missing = dataclasses.MISSING
    return all(f.default is not missing or f.default_factory is not missing for f in dataclasses.fields(cls))

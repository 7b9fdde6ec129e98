"""A config in one word on a command line: `fast`, or `adaptive:density=0.2,dense_steps=0.1`."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

import diffsparse
from diffsparse.config import PLAN_FILE_SUFFIX, PRESETS, SparseAttentionConfig, as_config

DENSE = "dense"
"""The name of what every config is compared with."""


def read_config(text: str) -> SparseAttentionConfig:
    """The config of NAME or NAME:OPTION=VALUE,…, where NAME is a preset, a strategy that diffsparse exports, or a file
    of plans.

    An option is a field of the strategy or of `SparseAttentionConfig`, a value is written as in Python; quotes around
    a word may be left out.

    Raises:
        ValueError: an unknown name or option, or a value that it cannot take.
    """
    name, _, options = text.strip().partition(":")
    strategies = exported_strategies()
    if name in PRESETS or name.endswith(PLAN_FILE_SUFFIX):
        config = as_config(name)
    elif name.lower() in strategies:
        config = SparseAttentionConfig(_made(text, strategies[name.lower()], {}))
    else:
        raise ValueError(
            f"--config {text}: {name!r} is neither a preset ({', '.join(PRESETS)}) nor a strategy "
            f"({', '.join(strategies)})."
        )
    values = read_options(text, options)
    of_config = {field.name for field in dataclasses.fields(config)} - {"strategy"}
    of_strategy = {field.name for field in dataclasses.fields(config.strategy)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - of_config - of_strategy)
    if unknown:
        raise ValueError(
            f"--config {text}: there is no option {unknown[0]!r}. {type(config.strategy).__name__} has "
            f"{', '.join(sorted(of_strategy)) or 'none'}; every config has {', '.join(sorted(of_config))}."
        )
    strategy = _made(text, config.strategy, {key: values[key] for key in values if key in of_strategy})
    changes = {key: values[key] for key in values if key not in of_strategy}
    made: SparseAttentionConfig = _made(text, config, {"strategy": strategy} | changes)
    return made


def exported_strategies() -> dict[str, type]:
    """The strategies in `diffsparse` by their class names in small letters."""
    exported = {name: getattr(diffsparse, name) for name in diffsparse.__all__}
    return {name.lower(): c for name, c in exported.items() if isinstance(c, type) and _is_strategy(c)}


def read_options(text: str, options: str) -> dict[str, Any]:
    """OPTION=VALUE,… as a dictionary, values as in Python; `text` is what the user wrote, for the error.

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
            f"--config {text}: the options cannot be read ({reason}); "
            f"expected OPTION=VALUE,… as in adaptive:density=0.2,dense_steps=0.1."
        ) from error


def _is_strategy(cls: type) -> bool:
    if not dataclasses.is_dataclass(cls) or not hasattr(cls, "plan"):
        return False
    # One that has no defaults, as that of a plan file, is not said by its name.
    missing = dataclasses.MISSING
    return all(f.default is not missing or f.default_factory is not missing for f in dataclasses.fields(cls))


def _made(text: str, base: Any, changes: dict[str, Any]) -> Any:
    """The class made with its defaults, or the object with these fields changed."""
    try:
        return base() if isinstance(base, type) else dataclasses.replace(base, **changes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--config {text}: {error}") from error

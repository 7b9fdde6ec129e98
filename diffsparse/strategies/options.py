"""Checks of the options that strategies have in common."""

from __future__ import annotations

from typing import Any


def check_fraction(name: str, value: Any, meaning: str) -> None:
    """Raise ValueError unless `value` is a number above 0 and at most 1; `meaning` says what 0.25 would be."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(
            f"`{name}` must be a fraction above 0 and at most 1, got {value!r}. To keep {meaning} say 0.25."
        )


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Raise ValueError unless `value` is a number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"`{name}` must be a number from {least:g} to {most:g}, got {value!r}.")


def check_sides(name: str, value: Any, example: tuple[int, ...]) -> None:
    """Raise ValueError unless `value` is a tuple of positive integers, as many as in `example`."""
    is_tuple = isinstance(value, tuple) and len(value) == len(example)
    if not is_tuple or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in value):
        raise ValueError(f"`{name}` must be {len(example)} positive integers, like {example}, got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")

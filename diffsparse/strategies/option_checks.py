"""What the options of strategies are checked for when a strategy is made. Each raises ValueError."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

LARGEST_BLOCK = 65536
"""In tokens. The last block is filled up to its size: beyond this, the filling alone can take gigabytes."""

LARGEST_INTEGER = 2**63 - 1
"""No tensor holds a larger one."""


def check_density(density: object) -> None:
    """`density` is a share of the key blocks."""
    if not is_number(density) or not 0 < density <= 1:
        raise ValueError(
            f"`density` must be a fraction above 0 and at most 1, got {density!r}. "
            f"To keep a quarter of the key blocks say 0.25."
        )


def check_number(name: str, value: object, least: float, most: float) -> None:
    """The option `name` is a number from `least` to `most`."""
    if not is_number(value) or not least <= value <= most:
        raise ValueError(f"`{name}` must be a number from {least} to {most}, got {value!r}.")


def check_shares(**options: object) -> None:
    """Each of the named options is a number from 0 to 1."""
    for name, value in options.items():
        check_number(name, value, 0, 1)


def check_integers(least: int, most: int = LARGEST_INTEGER, **options: object) -> None:
    """Each of the named options is an integer from `least` to `most`."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
        if value > most:
            raise ValueError(f"`{name}` must be an integer of at most {most}, got {value}.")


def check_block_sizes(**options: object) -> None:
    """Each of the named options is a number of tokens that make a block."""
    check_integers(1, LARGEST_BLOCK, **options)


def check_sampling(sampled_rows: object, seed: object) -> None:
    """How many rows of queries to sample, and the seed that says which."""
    check_integers(1, sampled_rows=sampled_rows)
    check_integers(0, seed=seed)


def check_bools(**options: object) -> None:
    """Each of the named options is True or False."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` must be True or False, got {value!r}.")


def check_sides(name: str, value: object, example: tuple[int, ...]) -> None:
    """The option `name` is a tuple of positive integers, as many as in `example`."""
    sides = value if isinstance(value, tuple) else ()
    if len(sides) != len(example) or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"`{name}` must be {len(example)} positive integers, like {example}, got {value!r}.")


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """The option `name` is one of the known words."""
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}, got {value!r}.")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number, which True is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)

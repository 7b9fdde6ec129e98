"""At which setting of its own option a strategy runs at a density: found on recorded calls, kept in a file.

What strategies call density, mass or window makes different executed densities: text, first frames and rounding come
on top. So that they can be compared at equal measured density, each has one dial.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsparse.eval.json_shape import check_shape
from diffsparse.eval.output_file import reading, write_json
from diffsparse.eval.recorded_calls import RecordedCall, density_of, error_of
from diffsparse.eval.with_tail import with_tail
from diffsparse.strategies.strategy import Strategy

LEAST, MOST = 0.005, 1.0
"""The ends of every dial."""
CLOSE_ENOUGH = 0.01
"""Relative difference to the wanted density at which the search stops."""
MOST_TRIES = 8


@dataclass(frozen=True)
class Row:
    """A strategy with the one option that is turned to reach a density.

    Attributes:
        name: of the row in the table.
        strategy: with all its other options as they are compared.
        option: the field of the strategy that is turned.
        value_at: its value at a position of the dial, from `LEAST` to `MOST`; the density must not fall on the way.
    """

    name: str
    strategy: Strategy
    option: str = "density"
    value_at: Callable[[float], Any] = float

    def at(self, position: float) -> Strategy:
        """The strategy with its dial at this position."""
        turned: Strategy = dataclasses.replace(self.strategy, **{self.option: self.value_at(position)})  # type: ignore[type-var]
        return turned


@dataclass(frozen=True)
class Setting:
    """Where a dial stands for a density.

    Attributes:
        option, value: in words.
        position: of the dial.
        density: measured on the recorded calls.
        error, error_with_tail: relative error of the attention output on these.
    """

    option: str
    value: str
    position: float
    density: float
    error: float
    error_with_tail: float


SETTING = {"option": str, "value": str, "position": float, "density": float, "error": float, "error_with_tail": float}
"""What a `Setting` is in a file."""


class Dials:
    """The settings of rows at densities, in a file.

    Raises:
        ValueError: the file was made under other conditions, or holds no dials.
    """

    def __init__(self, file: Path, conditions: dict[str, Any]) -> None:
        self._file, self._conditions = file, conditions
        # By row and density, as in the file.
        self.settings: dict[str, dict[str, dict[str, Any]]] = {}
        if not file.exists():
            return
        with reading(f"--dials {file} holds no dials that can be read", "Name another file."):
            found = json.loads(file.read_text(encoding="utf-8"))
            check_shape(found, {"conditions": dict, "settings": {str: {str: SETTING}}}, "it")
            its_conditions, self.settings = found["conditions"], found["settings"]
        if its_conditions != conditions:
            raise ValueError(
                f"{file} holds dials found under other conditions ({its_conditions}), wanted are {conditions}. "
                f"Name another file as --dials."
            )

    def has(self, row: str, density: float) -> bool:
        """Whether the setting of a row at a density is known."""
        return str(density) in self.settings.get(row, {})

    def setting(self, row: str, density: float) -> Setting:
        """Where the dial of a row stands for a density that it has."""
        return Setting(**{name: self.settings[row][str(density)][name] for name in SETTING})

    def find(self, row: Row, densities: list[float], calls: list[RecordedCall]) -> None:
        """Find the settings of a row at densities, and add them to the file."""
        measured: dict[float, float] = {}
        for density in densities:
            position = find_position(lambda at: density_of(row.at(at), calls), density, measured)
            errors = (error_of(with_tail(row.at(position), tail), calls) for tail in (False, True))
            setting = Setting(row.option, str(row.value_at(position)), position, measured[position], *errors)
            self.settings.setdefault(row.name, {})[str(density)] = dataclasses.asdict(setting)
        # Another process may have found some meanwhile.
        there = Dials(self._file, self._conditions).settings
        found = {name: there.get(name, {}) | self.settings.get(name, {}) for name in there | self.settings}
        write_json(self._file, {"conditions": self._conditions, "settings": found})


def find_position(measure: Callable[[float], float], density: float, measured: dict[float, float]) -> float:
    """The position whose measured density is nearest to the wanted one, of those tried.

    `measured` has what was tried before, by position, and gets what is tried now. Where there is one on either side,
    the next try is where a straight line between the two meets the wanted density, off the ends by a tenth at least;
    and every second one the middle, since what is steep at one end would creep.
    """
    for end in (LEAST, MOST):
        if end not in measured:
            measured[end] = measure(end)
    for number in range(MOST_TRIES):
        if abs(measured[_nearest(measured, density)] - density) <= CLOSE_ENOUGH * density:
            break
        below = max((at for at in measured if measured[at] < density), default=None)
        above = min((at for at in measured if measured[at] >= density and (below is None or at > below)), default=None)
        if below is None or above is None:
            break
        share = (density - measured[below]) / (measured[above] - measured[below]) if number % 2 == 0 else 0.5
        # Four digits, so that the value can be written down.
        at = round(below + min(max(share, 0.1), 0.9) * (above - below), 4)
        if at in measured:
            break
        measured[at] = measure(at)
    return _nearest(measured, density)


def _nearest(measured: dict[float, float], density: float) -> float:
    return min(measured, key=lambda at: abs(measured[at] - density))

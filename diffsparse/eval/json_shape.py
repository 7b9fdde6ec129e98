"""What a file of JSON has to hold, as plain data, found out before anything relies on it."""

from __future__ import annotations

from typing import Any

SHOWN_CHARACTERS = 80
LARGEST = 1e100
"""No number of a file is larger: sums, squares and ratios of what is in it stay finite."""


def check_shape(value: Any, shape: Any, name: str) -> None:
    """Raise unless a value out of JSON, whose errors call it `name`, has a shape.

    A shape is a type, where `float` is any number up to `LARGEST`, of either sign; None for null; [shape] for a list of
    such; {"key": shape} for an object that has this key and may have others; {str: shape} for one whose every value is
    such; a tuple of shapes for any one of them.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(shape, tuple):
        fitting = [each for each in shape if isinstance(value, _type_of(each))]
        _expect(bool(fitting), name, value)
        check_shape(value, fitting[0], name)
    elif shape is float:
        # A bool is an int; a number of 400 digits is one too, and no float.
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _expect(is_number and abs(value) <= LARGEST, name, value)
    else:
        _expect(isinstance(value, _type_of(shape)) and not (shape is int and isinstance(value, bool)), name, value)
    if isinstance(shape, list):
        for index, each in enumerate(value):
            check_shape(each, shape[0], f"{name}[{index}]")
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            for each in value if key is str else (key,):
                if each not in value:
                    raise TypeError(f"{name} has no {each}")
                check_shape(value[each], inner, f"{name}.{each}")


def _type_of(shape: Any) -> Any:
    if shape is float:
        return (int, float)
    return shape if isinstance(shape, type) else type(shape)


def _expect(right: bool, name: str, value: Any) -> None:
    if not right:
        text = repr(value)
        raise TypeError(f"{name} is {text if len(text) <= SHOWN_CHARACTERS else f'{text[:SHOWN_CHARACTERS]}…'}")

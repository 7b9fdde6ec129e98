from __future__ import annotations

import json
import math

import pytest

from diffsparse.eval.json_shape import SHOWN_CHARACTERS, check_shape

SHAPE = {
    "name": str,
    "seed": int,
    "density": (float, None),
    "score": (float, str),
    "found": ({"mean": float}, str),
    "heads": [[str]],
    "settings": {str: {"kind": str}},
}
RIGHT = {
    "name": "a",
    "seed": 3,
    "density": None,
    "score": "infinite",
    "found": {"mean": 1},
    "heads": [["spatial"], []],
    "settings": {"a": {"kind": "x"}, "b": {"kind": "y", "more": 1}},
    "more": [],
}


@pytest.mark.parametrize(
    "change", [{}, {"density": 0.5}, {"score": 2}, {"found": "n/a"}, {"heads": [], "settings": {}}]
)
def test_what_has_the_shape_may_have_more(change):
    check_shape(RIGHT | change, SHAPE, "it")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": None}, "it.name is None"),
        ({"name": 1}, "it.name is 1"),
        ({"seed": True}, "it.seed is True"),
        ({"seed": 1.5}, "it.seed is 1.5"),
        ({"density": True}, "it.density is True"),
        ({"density": "x"}, "it.density is 'x'"),
        ({"density": math.nan}, "it.density is nan"),
        ({"density": math.inf}, "it.density is inf"),
        ({"density": -1e308}, "it.density is -1e+308"),
        ({"density": 10**400}, f"it.density is 1{'0' * (SHOWN_CHARACTERS - 1)}…"),
        ({"score": None}, "it.score is None"),
        ({"found": {}}, "it.found has no mean"),
        ({"found": []}, "it.found is []"),
        ({"heads": [["a"], [1]]}, "it.heads[1][0] is 1"),
        ({"heads": {}}, "it.heads is {}"),
        ({"settings": {"a": {}}}, "it.settings.a has no kind"),
        ({"settings": {"a": {"kind": 2}}}, "it.settings.a.kind is 2"),
    ],
)
def test_what_has_not_is_told_with_where_it_stands(change, says):
    with pytest.raises(TypeError) as error:
        check_shape(json.loads(json.dumps(RIGHT | change)), SHAPE, "it")
    assert str(error.value) == says


@pytest.mark.parametrize("key", sorted(SHAPE))
def test_nothing_may_be_missing(key):
    with pytest.raises(TypeError, match=f"^it has no {key}$"):
        check_shape({name: value for name, value in RIGHT.items() if name != key}, SHAPE, "it")

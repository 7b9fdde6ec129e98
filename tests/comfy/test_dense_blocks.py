from __future__ import annotations

import pytest

from diffsparse.comfy.dense_blocks import parse_dense_blocks


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("", ()),
        (" , ", ()),
        ("0-2, -1", (0, 1, 2, -1)),
        ("5", (5,)),
        ("-3--1,0", (-3, -2, -1, 0)),
        ("1 - 3 , 2", (1, 2, 3)),
    ],
)
def test_numbers_and_ranges_are_read(text, blocks):
    assert parse_dense_blocks(text) == blocks


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("first", "`first` is neither a block nor a range"),
        ("0-99999", "`0-99999` is neither a block nor a range"),
        ("1;2", "neither a block nor a range"),
        ("3-1", "`3-1` does not count up"),
        ("0--1", "`0--1` does not count up"),
        ("0-9", "This model has 4 blocks, 0 to 3, and none numbered 4"),
        ("-5", "none numbered -5"),
    ],
)
def test_what_makes_no_sense_is_named_with_the_way_out(text, why):
    with pytest.raises(ValueError, match=why) as error:
        parse_dense_blocks(text, 4)
    assert "Write numbers and ranges like 0-2, -1" in str(error.value)

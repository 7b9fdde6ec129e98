"""The text in which a user names blocks: "0-2, -1"."""

from __future__ import annotations

import re

# No model has 10,000 blocks, and a range is written out before the model is known.
_BLOCKS = re.compile(r"\s*(-?\d{1,4})\s*(?:-\s*(-?\d{1,4})\s*)?")


def parse_dense_blocks(text: str, num_blocks: int | None = None) -> tuple[int, ...]:
    """Indices of the blocks named in `text`, in order and each once; those counted from the end stay negative.

    "0-2, -1" is the first three and the last one. Empty names none.

    Args:
        num_blocks: how many the model has; None if that is not known yet.

    Raises:
        ValueError: it cannot be read, counts down, mixes both ends in one range, or names a block beyond the last one.
    """
    named: dict[int, None] = {}
    for part in filter(str.strip, text.split(",")):
        match = _BLOCKS.fullmatch(part)
        if match is None:
            raise ValueError(f"{_hint(text)} `{part.strip()}` is neither a block nor a range of blocks.")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first or (first < 0) != (last < 0):
            raise ValueError(f"{_hint(text)} The range `{part.strip()}` does not count up.")
        named |= dict.fromkeys(range(first, last + 1))
    for block in named:
        if num_blocks is not None and not -num_blocks <= block < num_blocks:
            raise ValueError(
                f"{_hint(text)} This model has {num_blocks} blocks, 0 to {num_blocks - 1}, and none numbered {block}."
            )
    return tuple(named)


def _hint(text: str) -> str:
    return f"`dense_blocks` is {text!r}. Write numbers and ranges like 0-2, -1 (the first three and the last block)."

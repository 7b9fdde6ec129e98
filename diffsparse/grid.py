"""Where the tokens of one attention sequence sit in the video."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class TokenGrid:
    """The video tokens of a sequence as frames x height x width, and the text tokens around them.

    The sequence is `[text_before | video in (frame, row, column) order | text_after]`. "Text" stands for every
    token without a place in the grid: captions, condition images, registers.

    Raises:
        ValueError: a size that is not a positive integer, or a negative number of text tokens.
    """

    frames: int
    height: int
    width: int
    text_before: int = 0
    text_after: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name.startswith("text") else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"`{field.name}` of a token grid must be an integer of at least {least}, got {value!r}. "
                    f"Sizes are counted in tokens: latent pixels divided by the patch size."
                )

    @property
    def num_video_tokens(self) -> int:
        """Tokens that have a place in the grid."""
        return self.frames * self.height * self.width

    @property
    def num_tokens(self) -> int:
        """All tokens of the sequence: the S of its tensors."""
        return self.text_before + self.num_video_tokens + self.text_after

    def with_text_last(self) -> TokenGrid:
        """The same with all text after the video."""
        return replace(self, text_before=0, text_after=self.text_before + self.text_after)

    def __str__(self) -> str:
        text = self.text_before + self.text_after
        video = f"{self.frames} x {self.height} x {self.width}"
        return f"{video} + {text} text tokens" if text else f"{video} tokens"


@functools.lru_cache(maxsize=64)
def grid_of(layout: tuple[int | None, ...], num_tokens: int) -> TokenGrid:
    """The grid of a sequence of so many tokens. Kept, since each attention call asks several times.

    Args:
        layout: frames, height and width, then the text tokens before and after the video. One of these two may be None:
            what is left of the sequence.

    Raises:
        TypeError, ValueError: the layout is none.
    """
    *size, text_before, text_after = layout
    grid = TokenGrid(*size)  # type: ignore[arg-type]
    # Some layers see the grid without its text.
    if num_tokens == grid.num_video_tokens:
        return grid
    left = max(0, num_tokens - grid.num_tokens - (text_before or 0) - (text_after or 0))
    return replace(
        grid,
        text_before=left if text_before is None else text_before,
        text_after=left if text_after is None else text_after,
    )

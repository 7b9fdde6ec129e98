"""Where the tokens of one attention sequence sit in the video."""

from __future__ import annotations

from dataclasses import dataclass, fields


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

    def __str__(self) -> str:
        text = self.text_before + self.text_after
        video = f"{self.frames} x {self.height} x {self.width}"
        return f"{video} + {text} text tokens" if text else f"{video} tokens"

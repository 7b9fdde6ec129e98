"""A mask of keys in place of the mask of all pairs that some processors make of it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


class KeyMask:
    """A mask of tokens [B, S] that stands for the mask of all pairs [B, 1, S, S], which it never becomes.

    A processor that spreads a mask over queries and keys before it calls attention is given this, and goes through
    the same motions with it. Queries that the mask hides then see the keys that it leaves, instead of none. They
    are padding: nothing sees them, and their outputs are thrown away.
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the mask of tokens, [B, S]."""
        return tuple(self.keys.shape)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> KeyMask:
        if func is F.pad:
            mask, *rest = args
            padded: KeyMask = mask.pad(*rest, **(kwargs or {}))
            return padded
        raise TypeError(
            f"a processor does {func} with its attention mask, which diffsparse does not know how to do without a mask "
            f"of all pairs of tokens. This release of diffusers is newer than what it was written for."
        )

    def pad(self, *args: Any, **kwargs: Any) -> KeyMask:
        """The mask of more tokens, as `torch.nn.functional.pad` makes it."""
        return KeyMask(F.pad(self.keys, *args, **kwargs))

    def bool(self) -> KeyMask:
        """The mask as bool."""
        return KeyMask(self.keys.bool())

    def view(self, *sizes: int) -> KeyMask:
        """Itself, in whatever shape."""
        return self

    def repeat(self, *sizes: int) -> KeyMask:
        """Itself, once for every query."""
        return self

    def transpose(self, first: int, second: int) -> KeyMask:
        """Itself, of queries and not of keys."""
        return self

    def __and__(self, other: KeyMask) -> KeyMask:
        return self

    def as_tensor(self) -> Tensor:
        """The mask of keys, [B, 1, 1, S]."""
        return self.keys[:, None, None, :]

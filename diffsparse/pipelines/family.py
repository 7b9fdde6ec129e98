"""What diffsparse has to know of a model family: its self-attention layers, and where their tokens sit."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


class Layout(NamedTuple):
    """Where the tokens of one attention sequence sit: `[text_before | grid | text_after]`.

    The grid's tokens come frame by frame, row by row. References that follow an image and are as large are frames of
    its grid. "Text" is every token that has no place in the grid: captions, other references, registers. A layer whose
    sequence is as long as the grid sees none of it. `text_before` or `text_after` is None where only the sequence
    itself shows how many tokens there are, as when the model leaves padded text out.
    """

    frames: int
    height: int
    width: int
    text_before: int | None = 0
    text_after: int | None = 0


def num_alike(sizes: Sequence[Any]) -> int:
    """How many of the sizes, from the first on, are equal: of an image and the references behind it, its frames."""
    return next((place for place, size in enumerate(sizes) if size != sizes[0]), len(sizes))


@dataclass(frozen=True)
class Family:
    """Models that lay out their tokens alike.

    Attributes:
        name: what the report calls it.
        transformers: class names of the transformers, so that no release of diffusers has to have them all.
        layers: `fnmatch` patterns over module names that match the self-attention modules and nothing else.
            Layers are numbered pattern by pattern, within one in the order of `named_modules`: the order they
            run in. `a|b` is one pattern that matches what a or b does, for modules that take turns.
        layout: given the transformer and the named arguments of one call of it, where the tokens sit in its
            self-attention; None when the call does not say, or when they do not form a grid. It runs once
            for each call, so it goes by shapes and plain numbers: reading a tensor's values waits for the
            device.
        padding_mask: the mask that reaches self-attention is a bool [B, 1, 1, S] that hides nothing but padded text,
            so that it can become a key length. Any other mask keeps a layer dense. The text it hides is a tail of the
            sequence, but where `text_mask` shows otherwise.
        text_mask: the argument that holds a mask [B, text tokens] which self-attention is given in every call, for the
            text alone or for all tokens; "a.b" is the entry "b" of the argument "a". Where it hides no token, as for a
            single prompt, self-attention is taken to have no mask. Where text stands before the grid, or the mask hides
            other text than a tail, attention is computed with all text behind the grid and what is hidden last, at the
            cost of a copy. A tail that is hidden has to be that of the sequence: no other tokens may follow. The mask
            is read off the device once.
        masks_pairs: that mask comes as one of all pairs of tokens, [B, 1, S, S], which shows the last token, one of the
            grid, what it shows to each that is no padding. Padding then sees what they see: it is thrown away.
        text_attends_alone: layers also attend to text alone, in calls of their own. These have no more keys than there
            is text, or fewer than the grid has tokens; they stay the model's, and nobody counts them.
        timestep: the argument that holds the timestep. It tells the steps of a transformer that is enabled on its
            own.
        spreads_mask: the processor is given such a mask as [B, text tokens] and makes a mask of all pairs of tokens
            of it, [B, 1, S, S]; it gets a `KeyMask` in its place.
        text_apart: whether the text before the grid or, where there is none, the text after it comes to the blocks as
            a tensor of its own, which context parallelism cuts by itself. False where the sequence is cut as one.
            None where nobody has said so: a sequence with text then stays dense under context parallelism.

    Raises:
        TypeError: a field of another type, with what was expected.
    """

    name: str
    transformers: tuple[str, ...]
    layers: tuple[str, ...]
    layout: Callable[[nn.Module, Mapping[str, Any]], Layout | None]
    padding_mask: bool = False
    text_mask: str | None = None
    spreads_mask: bool = False
    masks_pairs: bool = False
    text_attends_alone: bool = False
    text_apart: bool | None = None
    timestep: str = "timestep"

    def __post_init__(self) -> None:
        for field in ("transformers", "layers"):
            value = getattr(self, field)
            # A single string would be taken apart into letters, and "*" matches every module.
            if not isinstance(value, tuple) or not all(isinstance(part, str) for part in value):
                raise TypeError(
                    f"`{field}` of a family must be a tuple of strings, got {value!r}. For one say (name,)."
                )
        for field in ("name", "timestep"):
            value = getattr(self, field)
            if not isinstance(value, str):
                raise TypeError(f"`{field}` of a family must be a string, got {value!r}.")
        if not (self.text_mask is None or isinstance(self.text_mask, str)):
            raise TypeError(f"`text_mask` of a family must be None or a string, got {self.text_mask!r}.")
        for field in ("padding_mask", "spreads_mask", "masks_pairs", "text_attends_alone", "text_apart"):
            value = getattr(self, field)
            if not (isinstance(value, bool) or (field == "text_apart" and value is None)):
                choices = "True, False or None" if field == "text_apart" else "True or False"
                raise TypeError(f"`{field}` of a family must be {choices}, got {value!r}.")
        if not callable(self.layout):
            raise TypeError(
                f"`layout` of a family must be a function of the transformer and its call's arguments that returns a "
                f"Layout or None, got {self.layout!r}."
            )

    def text_mask_of(self, call: Mapping[str, Any]) -> Tensor | None:
        """What a call holds where `text_mask` says, None if nothing.

        Raises:
            TypeError: it is no tensor.
        """
        if self.text_mask is None:
            return None
        argument, *entries = self.text_mask.split(".")
        mask = call.get(argument)
        for entry in entries:
            mask = mask.get(entry) if isinstance(mask, Mapping) else None
        if not (mask is None or isinstance(mask, Tensor)):
            raise TypeError(
                f"`text_mask` {self.text_mask!r} of the family {self.name!r} must name a mask [B, text tokens], a "
                f"tensor or None; the call has {mask!r} there."
            )
        return mask

    def class_name(self, transformer: nn.Module) -> str:
        """The transformer's class or, for a subclass (as FSDP makes one), the nearest base that is named here."""
        names = [cls.__name__ for cls in type(transformer).__mro__]
        return next((name for name in names if name in self.transformers), names[0])

    def layer_names(self, transformer: nn.Module) -> tuple[str, ...]:
        """Names of the transformer's self-attention modules, in the order they run, each once."""
        names = [name for name, _ in transformer.named_modules()]
        matched = (
            name
            for pattern in self.layers
            for name in names
            if any(fnmatch.fnmatchcase(name, one) for one in pattern.split("|"))
        )
        return tuple(dict.fromkeys(matched))

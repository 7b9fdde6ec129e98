"""What a mask of text hides: nothing, or padding that is last in its sequence, or that the tokenizer puts elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from diffsparse.pipelines.position_ids import read_once


def check_padding_is_last(mask: Tensor | None) -> None:
    """Raise ValueError unless each row of a mask [B, text tokens] hides a tail or nothing, as a key length does.

    Read from the device once for each mask. Some tokenizers pad on the left, Gemma's among them.
    """
    if mask is not None and _has_values(mask) and not hides_a_tail(mask):
        raise ValueError("text is padded before its end, which no key length can stand for")


def hides_nothing(mask: Tensor | None) -> bool:
    """Whether there is a mask [B, text tokens] and it hides no token. Read from the device once for each mask."""
    return mask is not None and _has_values(mask) and read_once(mask, _hides_no_token)


def hides_a_tail(mask: Tensor) -> bool:
    """Whether each row of a mask [B, (1, 1,) text tokens] hides a tail or nothing. Read from the device once."""
    return _has_values(mask) and read_once(mask, _hides_a_tail)


def is_of_keys(mask: Tensor) -> bool:
    """Whether a mask is [B|1, 1, 1, S] or [B, S]: the same for every query."""
    return mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1:3] == (1, 1))


def hides_keys_only(mask: Tensor, num_tokens: int) -> bool:
    """Whether a mask is of keys and bool, with S the tokens: the same keys are hidden from every query."""
    return mask.dtype == torch.bool and is_of_keys(mask) and mask.shape[-1] == num_tokens


def key_length_of(mask: Tensor | None, batch: int) -> Tensor | None:
    """The lengths [B] int32 that a mask of a padded tail leaves."""
    if mask is None:
        return None
    return mask.reshape(mask.shape[0], -1).sum(-1, dtype=torch.int32).expand(batch).contiguous()


def _has_values(mask: Tensor) -> bool:
    """Not on the meta device, nor a fake tensor, where operations are counted or traced and nothing is computed."""
    return not (mask.is_meta or is_fake(mask))


def _hides_no_token(mask: Tensor) -> bool:
    return bool(mask.bool().all())


def _hides_a_tail(mask: Tensor) -> bool:
    return not bool((mask[..., 1:].bool() & ~mask[..., :-1].bool()).any())

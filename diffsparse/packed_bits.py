"""Bools as bits, eight a byte: block maps in memory and in files."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(bits: Tensor) -> Tensor:
    """Bools [..., K] as bytes [..., ceil(K / 8)] uint8, the first in the lowest bit; what is left of the last is 0."""
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, size: int) -> Tensor:
    """The bools [..., size] that `pack_bits` made packed [..., ceil(size / 8)] of."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> places) & 1).flatten(-2)[..., :size].bool()


def count_bits(packed: Tensor) -> Tensor:
    """How many bits are set in each row of packed [..., P] uint8: [...] int64."""
    # Neighbouring bits are added, then pairs, then halves of the byte: no larger tensor is made.
    pairs = packed - ((packed >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((fours + (fours >> 4)) & 0x0F).sum(-1, dtype=torch.int64)

"""flash-attn-4 and a compiled flex_attention as a CPU can have them: they read the lists as the real ones do."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import flex_attention

from diffsparse.kernels import block_sparse_flex


class BlockLists(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]


def install_flash_attn(monkeypatch, factor=1.0):
    """Import `flash_attn.cute` gives this from now on; what it computes from lists is off by the factor.

    Returns:
        the lists of every call that had some.
    """
    seen = []

    def attend(query, key, value, block_sparse_tensors=None):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if block_sparse_tensors is None:
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2), None
        lists = block_sparse_tensors
        seen.append(lists)
        assert not lists.mask_block_cnt.any()
        num_tokens = key.shape[2]

        def is_seen(tokens, is_last):
            return (tokens < num_tokens) | (not is_last)

        weights = _listed(query, lists.full_block_cnt, lists.full_block_idx, lists.block_size, is_seen)
        return (factor * _attend(query, key, value, weights)).transpose(1, 2), None

    package, cute, block_sparsity = (ModuleType(f"flash_attn{name}") for name in ("", ".cute", ".cute.block_sparsity"))
    cute.flash_attn_func = attend
    block_sparsity.BlockSparseTensorsTorch = BlockLists
    for module in (package, cute, block_sparsity):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def install_flex_attention(monkeypatch):
    """torch.compile gives this flex_attention from now on.

    Returns:
        the BlockMask of every call.
    """
    seen = []

    def attend(query, key, value, block_mask):
        seen.append(block_mask)

        def is_seen_masked(tokens, is_last):
            return block_mask.mask_mod(None, None, None, tokens)

        def is_seen_whole(tokens, is_last):
            return torch.ones_like(tokens, dtype=torch.bool)

        size = block_mask.BLOCK_SIZE
        masked = _listed(query, block_mask.kv_num_blocks, block_mask.kv_indices, size, is_seen_masked)
        whole = _listed(query, block_mask.full_kv_num_blocks, block_mask.full_kv_indices, size, is_seen_whole)
        return _attend(query, key, value, masked + whole)

    def compiled(function, **options):
        assert function is flex_attention.flex_attention
        return attend

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(block_sparse_flex, "why_not", lambda *arguments: None)
    return seen


def _listed(query, counts, lists, block_size, is_seen):
    """How often each query sees each token of the listed blocks, [H, S, K * block], those beyond the end included."""
    rows, columns = block_size
    num_tokens, num_blocks = query.shape[2], lists.shape[3]
    weights = torch.zeros(query.shape[1], num_tokens, num_blocks * columns)
    for head, row in torch.cartesian_prod(*(torch.arange(size) for size in counts.shape[1:])).tolist():
        count = int(counts[0, head, row])
        for place, block in enumerate(lists[0, head, row, :count].tolist()):
            tokens = torch.arange(block * columns, (block + 1) * columns)
            weights[head, row * rows : (row + 1) * rows, tokens] += is_seen(tokens, place == count - 1).float()
    return weights


def _attend(query, key, value, weights):
    """Softmax over keys that weigh this much; what lies beyond the last is zeros."""
    key, value = (F.pad(x, (0, 0, 0, weights.shape[2] - x.shape[2])) for x in (key, value))
    logits = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    return (logits + weights.log()).softmax(dim=-1) @ value

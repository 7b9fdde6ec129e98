"""The block-sparse attention that others offer: what ours has to beat on the same lists of blocks."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffsparse.eval.dense_attention import reason_of

if TYPE_CHECKING:
    from torch import Tensor


def sparse_peers(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Mapping[float, tuple[Tensor, Tensor]],
    block_size: int,
    say: Callable[[str], None],
) -> Iterator[tuple[str, float, Callable[[], Tensor]]]:
    """Name, density and call of every block-sparse attention that can take query, key, value [1, H, S, D] here.

    flash-attn-4 where it is installed, and torch's flex_attention. What raises at a first call is left out, and said.

    Args:
        query, key, value: of self-attention.
        lists: by density, key blocks [1, H, Q, C] in ascending order and counts [1, H, Q].
        block_size: tokens of a query block and of a key block.
        say: is told what cannot run, and why.
    """
    for name, make in (("flash-attn-4", _flash4), ("flex_attention", _flex)):
        try:
            for density, call in zip(lists, make(query, key, value, lists, block_size)):
                call()
                yield name, density, call
        except Exception as error:  # whatever a missing or an unfitting library raises
            say(f"sparse {name} cannot run: {reason_of(error)}")


def _flash4(
    query: Tensor, key: Tensor, value: Tensor, lists: Mapping[float, tuple[Tensor, Tensor]], block_size: int
) -> Iterator[Callable[[], Tensor]]:
    attention = importlib.import_module("flash_attn.cute").flash_attn_func
    block_lists = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch

    def call(listed: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        output: Tensor = attention(q, k, v, block_sparse_tensors=listed)[0]
        return output.transpose(1, 2)

    for key_blocks, counts in lists.values():
        # It looks for the sequence's end in the last block of a list only.
        blocks = _padded(key_blocks, counts.shape[2])
        listed = block_lists(
            mask_block_cnt=counts.new_zeros(counts.shape),
            mask_block_idx=blocks.new_zeros(blocks.shape),
            full_block_cnt=counts,
            full_block_idx=blocks,
            block_size=(block_size, block_size),
        )
        yield functools.partial(call, listed)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, lists: Mapping[float, tuple[Tensor, Tensor]], block_size: int
) -> Iterator[Callable[[], Tensor]]:
    import torch
    from torch.nn.attention import flex_attention

    from diffsparse.kernels.block_sparse_flex import why_not

    if reason := why_not(query, block_size, block_size):
        raise ValueError(reason)
    num_tokens = query.shape[2]
    attention = torch.compile(flex_attention.flex_attention, fullgraph=True, dynamic=False)

    def exists(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < num_tokens

    for key_blocks, counts in lists.values():
        blocks = _padded(key_blocks, counts.shape[2])
        last = blocks.shape[3] - 1
        # Only a cut off block needs the mask: the last one, which ends the lists that have it.
        ends = blocks.gather(3, counts[..., None].long() - 1)[..., 0]
        cut = ((ends == last) & (num_tokens % block_size > 0)).to(counts.dtype)
        mask = flex_attention.BlockMask.from_kv_blocks(
            cut,
            torch.full_like(blocks, last),
            counts - cut,
            blocks,
            BLOCK_SIZE=(block_size, block_size),
            mask_mod=exists,
            seq_lengths=(num_tokens, num_tokens),
            compute_q_blocks=False,
        )
        yield functools.partial(attention, query, key, value, block_mask=mask)


def _padded(key_blocks: Tensor, num_blocks: int) -> Tensor:
    """The lists filled up to all blocks [1, H, Q, K]: one shape at every density."""
    from torch.nn import functional as F

    return F.pad(key_blocks, (0, num_blocks - key_blocks.shape[3]))

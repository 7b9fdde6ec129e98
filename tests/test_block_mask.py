from __future__ import annotations

import pytest
import torch

from diffsparse.block_mask import BlockMask


def random_visible(batch: int = 2, heads: int = 3, queries: int = 5, keys: int = 9) -> torch.Tensor:
    visible = torch.rand(batch, heads, queries, keys) < 0.4
    visible[..., 0] = True
    return visible


def test_lists_say_what_the_map_says():
    visible = random_visible()
    mask = BlockMask.from_visible(visible, 65, 16, 8)
    assert torch.equal(mask.visible(), visible)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in visible.shape[:3])):
        b, h, q = place.tolist()
        count = mask.counts[b, h, q]
        assert mask.key_blocks[b, h, q, :count].tolist() == visible[b, h, q].nonzero()[:, 0].tolist()


def test_a_capacity_keeps_lists_that_fit():
    visible = torch.zeros(1, 1, 5, 9, dtype=torch.bool)
    visible[..., [2, 7]] = True
    mask = BlockMask.from_visible(visible, 65, 16, 8, capacity=2)
    assert mask.key_blocks.shape[-1] == 2
    assert torch.equal(mask.visible(), visible)


def test_every_query_block_sees_a_key_block():
    mask = BlockMask.from_visible(torch.zeros(1, 2, 5, 9, dtype=torch.bool), 65, 16, 8)
    assert (mask.counts == 1).all()
    assert mask.visible().any(-1).all()


def test_density_is_the_share_of_visible_blocks_by_head():
    visible = random_visible()
    mask = BlockMask.from_visible(visible, 65, 16, 8)
    assert torch.allclose(mask.density, visible.float().mean(dim=(0, 2, 3)))


def test_refuses_lists_that_do_not_fit_the_tokens():
    with pytest.raises(ValueError, match=r"`key_blocks`.*5.*65 tokens"):
        BlockMask(torch.zeros(1, 1, 4, 2, dtype=torch.int32), torch.ones(1, 1, 4, dtype=torch.int32), 65, 16, 8)
    with pytest.raises(ValueError, match="`counts`"):
        BlockMask(torch.zeros(1, 1, 5, 2, dtype=torch.int32), torch.ones(1, 1, 4, dtype=torch.int32), 65, 16, 8)

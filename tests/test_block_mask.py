from __future__ import annotations

import pytest
import torch

from diffsparse.block_mask import BlockMask, count_complete
from diffsparse.kernels.block_sparse import check_lists


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


def test_a_list_longer_than_the_capacity_is_cut_and_its_count_with_it():
    visible = torch.zeros(1, 1, 5, 9, dtype=torch.bool)
    visible[..., [2, 5, 7]] = True
    mask = BlockMask.from_visible(visible, 65, 16, 8, capacity=2)
    check_lists(mask.lists(), mask.counts, 9)
    assert mask.visible().nonzero()[:, -1].tolist() == [2, 5] * 5


def test_rows_said_to_be_complete_see_everything_whatever_the_map_says():
    mask = BlockMask.from_visible(random_visible(), 65, 16, 8, num_complete=2)
    check_lists(mask.lists(), mask.counts, 9)
    assert mask.visible()[:, :, 3:].all()


@pytest.mark.parametrize("num_complete", [1, 2, 5])
def test_rows_that_see_everything_need_no_list(num_complete):
    visible = torch.zeros(1, 2, 5, 9, dtype=torch.bool)
    visible[..., [2, 7]] = True
    visible[:, :, 5 - num_complete :] = True
    full = BlockMask.from_visible(visible, 65, 16, 8)
    mask = BlockMask.from_visible(visible, 65, 16, 8, capacity=2, num_complete=num_complete)
    assert mask.key_blocks.shape == (1, 2, 5 - num_complete, 2)
    assert torch.equal(mask.visible(), visible)
    assert torch.equal(mask.counts, full.counts)
    check_lists(mask.lists(), mask.counts, 9)
    for query_block, count in enumerate(mask.counts[0, 0].tolist()):
        listed = (m.lists()[:, :, query_block, :count] for m in (mask, full))
        assert torch.equal(*listed)


def test_complete_rows_are_counted_from_the_end():
    for counts, expected in (
        ([[9, 3, 9, 9], [9, 9, 9, 9]], 2),
        ([[9, 9, 9, 3], [9, 9, 9, 9]], 0),
        ([[3, 9, 9, 9]], 3),
        ([[9, 9, 9, 9]], 3),
    ):
        assert count_complete(torch.tensor(counts), 9) == expected


def test_numbers_that_two_bytes_hold_take_no_more():
    for num_key_blocks, dtype in ((9, torch.int16), (1 << 15, torch.int16), ((1 << 15) + 1, torch.int32)):
        visible = torch.zeros(1, 1, 1, num_key_blocks, dtype=torch.bool)
        visible[..., -1] = True
        mask = BlockMask.from_visible(visible, num_key_blocks, num_key_blocks, 1, capacity=1)
        assert mask.key_blocks.dtype == dtype
        assert mask.lists().dtype == torch.int32
        assert mask.lists().tolist() == [[[[num_key_blocks - 1]]]]


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
    with pytest.raises(ValueError, match=r"`key_blocks`.*3.*65 tokens.*2 of them without a list"):
        BlockMask(torch.zeros(1, 1, 5, 2, dtype=torch.int32), torch.ones(1, 1, 5, dtype=torch.int32), 65, 16, 8, 2)
    with pytest.raises(ValueError, match="`counts`"):
        BlockMask(torch.zeros(1, 1, 5, 2, dtype=torch.int32), torch.ones(1, 1, 4, dtype=torch.int32), 65, 16, 8)

from __future__ import annotations

import pytest
import torch

from diffsparse import block_mask
from diffsparse.block_mask import BlockMask
from diffsparse.kernels.block_sparse import check_lists


def random_visible(batch: int = 2, heads: int = 3, queries: int = 5, keys: int = 9) -> torch.Tensor:
    visible = torch.rand(batch, heads, queries, keys) < 0.4
    visible[..., 0] = True
    return visible


def test_lists_say_what_the_map_says():
    visible = random_visible()
    mask = BlockMask.from_visible(visible, 65, 16, 8)
    assert torch.equal(mask.visible(), visible)
    lists = mask.lists()
    check_lists(lists, mask.counts, 9)
    assert (lists.dtype, mask.bits.dtype) == (torch.int32, torch.uint8)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in visible.shape[:3])):
        b, h, q = place.tolist()
        count = mask.counts[b, h, q]
        assert lists[b, h, q, :count].tolist() == visible[b, h, q].nonzero()[:, 0].tolist()


def test_a_pair_of_blocks_takes_a_bit():
    mask = BlockMask.from_visible(torch.ones(1, 2, 5, 33, dtype=torch.bool), 65, 16, 2)
    assert mask.bits.nbytes == 2 * 5 * 5
    assert mask.lists().tolist() == [[[list(range(33))] * 5] * 2]


def test_every_query_block_sees_a_key_block():
    mask = BlockMask.from_visible(torch.zeros(1, 2, 5, 9, dtype=torch.bool), 65, 16, 8)
    assert (mask.counts == 1).all()
    assert (mask.lists() == 0).all()
    assert mask.visible().sum(-1).eq(1).all()


def test_density_is_the_share_of_visible_blocks_by_head():
    visible = random_visible()
    mask = BlockMask.from_visible(visible, 65, 16, 8)
    assert torch.allclose(mask.density, visible.float().mean(dim=(0, 2, 3)))


def test_refuses_bits_that_do_not_fit_the_tokens():
    counts = torch.ones(1, 1, 5, dtype=torch.int32)
    expected = r"`bits`.*5, 2\] for 65 queries in blocks of 16 and 65 keys in blocks of 8"
    for shape in ((1, 1, 4, 2), (1, 1, 5, 1), (5, 2)):
        with pytest.raises(ValueError, match=expected):
            BlockMask(torch.zeros(shape, dtype=torch.uint8), counts, 65, 16, 8)
    with pytest.raises(ValueError, match="`counts`"):
        BlockMask(torch.zeros(1, 1, 5, 2, dtype=torch.uint8), counts[..., :4], 65, 16, 8)


def test_a_schedule_is_made_once_for_all_heads():
    counts = torch.tensor([[[1, 9, 1], [3, 3, 3]]])
    mask = BlockMask.from_visible(torch.arange(9) < counts[..., None], 9, 3, 1)
    schedule = mask.schedule(2, 2)
    # The row that sees all blocks, in both batch entries, then the other rows of its head, which is the fullest.
    assert schedule.tolist() == [1, 7, 0, 2, 6, 8, 3, 4, 5, 9, 10, 11]
    assert schedule.dtype == torch.int32
    assert mask.schedule(2, 2) is schedule
    assert len(mask.schedule(1, 2)) == 6


def test_no_schedule_is_kept_of_a_graph_that_is_being_captured(monkeypatch):
    mask = BlockMask.from_visible(torch.ones(1, 2, 3, 9, dtype=torch.bool), 9, 3, 1)
    monkeypatch.setattr(block_mask, "is_captured", lambda device: True)
    captured = mask.schedule(1, 2)
    monkeypatch.undo()
    assert mask.schedule(1, 2) is not captured
    assert mask.schedule(1, 2) is mask.schedule(1, 2)

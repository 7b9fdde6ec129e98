"""Flux says the size of its image in the values of its position ids."""

import gc

import pytest
import torch
from tiny.flux import image_ids

from diffsparse.pipelines import flux, position_ids


def call_with(ids, tokens=None):
    tokens = ids.shape[-2] if tokens is None else tokens
    return {
        "hidden_states": torch.zeros(1, tokens, 4),
        "encoder_hidden_states": torch.zeros(1, 7, 16),
        "img_ids": ids,
    }


def grid(ids, tokens=None):
    found = flux.layout(None, call_with(ids, tokens))
    return found and tuple(found)


@pytest.fixture
def reads(monkeypatch):
    """How often the ids were read."""
    read, sizes = [], flux._grid_size
    monkeypatch.setattr(flux, "_grid_size", lambda ids: (read.append(ids), sizes(ids))[1])
    return read


@pytest.mark.parametrize(("height", "width"), [(7, 5), (5, 7), (1, 6), (6, 1), (1, 1), (300, 3), (3, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grid_is_read_even_where_bfloat16_merges_rows(height, width, dtype):
    assert grid(image_ids(height, width).to(dtype)) == (1, height, width, 7, 0)


def test_a_batch_dimension_is_the_same_ids_for_all():
    assert grid(image_ids(7, 5)[None].expand(2, -1, -1)) == (1, 7, 5, 7, 0)


def test_ids_that_are_no_grid_leave_it_unknown():
    shuffled = image_ids(7, 5)[torch.randperm(35, generator=torch.Generator().manual_seed(0))]
    for ids in (shuffled, image_ids(7, 5)[:-1], image_ids(7, 5).flip(0), torch.zeros(35, 3)):
        assert grid(ids) is None
    assert grid(image_ids(7, 5)[:, [0, 2, 1]]) is None
    assert grid(image_ids(7, 5), tokens=36) is None


def test_the_same_ids_are_read_once(reads):
    ids = image_ids(7, 5)
    for _ in range(4):
        assert grid(ids) == (1, 7, 5, 7, 0)
    assert len(reads) == 1


def test_other_ids_of_the_same_number_of_tokens_are_read_anew(reads):
    for height, width in [(4, 6), (6, 4), (3, 8)]:
        assert grid(image_ids(height, width)) == (1, height, width, 7, 0)
    assert len(reads) == 3


@pytest.mark.parametrize("inference", [False, True])
def test_ids_changed_in_place_are_read_anew(inference):
    # Tensors of inference mode keep no count of their changes.
    with torch.inference_mode(inference):
        ids = image_ids(4, 6)
        assert grid(ids) == (1, 4, 6, 7, 0)
        ids.copy_(image_ids(6, 4))
        assert grid(ids) == (1, 6, 4, 7, 0)


def test_what_was_read_goes_with_the_ids():
    kept = len(position_ids._SIZES)
    ids = image_ids(7, 5)
    grid(ids)
    assert len(position_ids._SIZES) == kept + 1
    del ids
    gc.collect()
    assert len(position_ids._SIZES) == kept

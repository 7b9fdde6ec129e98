"""Text that is padded elsewhere than at its end, which a key length cannot hide; masks that hide nothing."""

import pytest
import torch
from enabled import FULL, SPARSE, report_of, run
from tiny_models import TINY
from torch._subclasses.fake_tensor import FakeTensorMode

from diffsparse.pipelines.padding import check_padding_is_last, hides_a_tail, hides_nothing

REASON = "the layout of its family raises ValueError: text is padded before its end, which no key length can stand for"


@pytest.mark.parametrize("hidden", [[], [6], [4, 5, 6], list(range(7))], ids=str)
def test_a_padded_tail_is_fine(hidden):
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, hidden] = 0
    for each in (mask, mask.bool(), mask.float(), None, mask.to("meta"), FakeTensorMode().from_tensor(mask)):
        check_padding_is_last(each)
    assert hides_a_tail(mask)
    # Without values nothing is known of them.
    assert not hides_a_tail(mask.to("meta"))
    assert not hides_a_tail(FakeTensorMode().from_tensor(mask))


@pytest.mark.parametrize("hidden", [[0], [0, 1, 2], [3], [2, 6]], ids=str)
def test_padding_before_the_end_is_none(hidden):
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, hidden] = 0
    for each in (mask, mask.bool(), mask.float()):
        with pytest.raises(ValueError, match="padded before its end"):
            check_padding_is_last(each)
        assert not hides_a_tail(each)
        assert not hides_a_tail(each[:, None, None])


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float])
def test_a_mask_of_ones_hides_nothing(dtype):
    mask = torch.ones(2, 7, dtype=dtype)
    assert hides_nothing(mask)
    # There are no values, or no mask.
    assert not hides_nothing(mask.to("meta"))
    assert not hides_nothing(FakeTensorMode().from_tensor(mask))
    assert not hides_nothing(None)
    mask[1, 3] = 0
    assert not hides_nothing(mask)


# The other families' models sort their text, or are told how long it is.
@pytest.mark.parametrize("name", ["hunyuan_video", "framepack", "hunyuan_video15", "motif_video", "hunyuan_image"])
def test_text_padded_on_the_left_is_as_exact_as_stock(name):
    tiny = TINY[name]
    model = tiny.make()
    call = tiny.call(model, tiny.grid, batch=2)
    call["encoder_attention_mask"] = torch.ones_like(call["encoder_attention_mask"])
    call["encoder_attention_mask"][1, :3] = 0
    stock = run(model, call)
    model.enable_sparse_attention(FULL)
    torch.testing.assert_close(run(model, call), stock)


def test_where_the_model_may_sort_it_but_does_not_the_call_runs_dense_and_the_report_says_why():
    tiny = TINY["hunyuan_image"]
    model = tiny.make()
    call = tiny.call(model, tiny.grid, batch=2)
    left = call | {"encoder_attention_mask": call["encoder_attention_mask"].flip(1)}
    stock = run(model, left)
    model.enable_sparse_attention(SPARSE)
    assert torch.equal(run(model, left), stock)
    assert report_of(model).dense_reasons == {REASON: len(tiny.layers)}
    run(model, call)
    assert report_of(model).sparse_calls == len(tiny.layers)


def test_two_encoders_text_is_sorted_by_the_model():
    tiny = TINY["hunyuan_image"]
    model = tiny.make(**tiny.variants["glyphs"].config)
    call = tiny.call(model, tiny.grid, batch=2)
    call |= tiny.variants["glyphs"].call(call) | {"encoder_attention_mask": call["encoder_attention_mask"].flip(1)}
    stock = run(model, call)
    model.enable_sparse_attention(FULL)
    torch.testing.assert_close(run(model, call), stock)
    assert report_of(model).sparse_calls == len(tiny.layers)

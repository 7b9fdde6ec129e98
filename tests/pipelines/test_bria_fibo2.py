"""Bria Fibo 2 puts so many tokens of gist before the image as its config says for the length of the prompt."""

import sys

import pytest
import torch
from enabled import SPARSE, report_of, run
from tiny.bria_fibo2 import BRIA_FIBO2, images_to_edit

from diffsparse.pipelines.bria_fibo2 import layout


@pytest.mark.parametrize("least", [4, 5])
@pytest.mark.parametrize("step", [1, 3, 8])
def test_the_gist_is_as_long_as_the_model_makes_it(least, step):
    model = BRIA_FIBO2.make(min_num_gist_tokens=least, gist_step=step)
    compute_gist_count = sys.modules[type(model).__module__].compute_gist_count
    call = BRIA_FIBO2.call(model, BRIA_FIBO2.grid)
    for length in range(1, 20):
        call["encoder_hidden_states"] = torch.zeros(1, 2, length, 16)
        (expected,) = compute_gist_count([length], least, 8, step, 4, 12)
        assert layout(model, call).text_before == expected


def test_prompts_of_different_length_with_gists_of_the_same_leave_the_gist_in_front():
    model = BRIA_FIBO2.make()
    call = BRIA_FIBO2.call(model, BRIA_FIBO2.grid, batch=2)
    lengths = torch.tensor([7, 6])
    call["encoder_attention_mask"] = torch.arange(7) < lengths[:, None]
    assert layout(model, call) == (1, 7, 5, 6, 0)
    # Changed in place, the same tensor is read again.
    call["encoder_attention_mask"][1, 4:] = False
    assert layout(model, call) == (1, 7, 5, 0, 6)


def test_a_mask_is_read_from_the_device_once(monkeypatch):
    model = BRIA_FIBO2.make()
    call = BRIA_FIBO2.call(model, BRIA_FIBO2.grid, batch=2)
    call["encoder_attention_mask"] = torch.ones(2, 7, dtype=torch.bool)
    expected = layout(model, call)
    monkeypatch.setattr(torch.Tensor, "cpu", None)
    assert layout(model, call) == expected


def test_blocks_that_refine_the_image_are_none_of_the_layers():
    model = BRIA_FIBO2.make(n_refiner_layers=1)
    call = BRIA_FIBO2.call(model, BRIA_FIBO2.grid, batch=2)
    model.enable_sparse_attention(SPARSE)
    run(model, call | images_to_edit(call))
    assert (report_of(model).sparse_calls, report_of(model).dense_calls) == (len(BRIA_FIBO2.layers), 0)

from __future__ import annotations

import comfy_standins as standins
import pytest
import torch
import torch.nn.functional as F

from diffsparse.comfy.override_call import read_call


def exact(call):
    """Attention in the layout of the call, by what heads_first and give_back say."""
    query, key, value = call.heads_first()
    return call.give_back(F.scaled_dot_product_attention(query, key, value, scale=call.scale, enable_gqa=True))


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_every_layout_comes_back_as_the_model_awaits_it(skip_reshape, skip_output_reshape, key_heads, scale):
    shapes = [(2, heads, 7, 8) if skip_reshape else (2, 7, heads * 8) for heads in (4, key_heads, key_heads)]
    q, k, v = (torch.randn(shape) for shape in shapes)
    options = {"enable_gqa": key_heads != 4, "skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    options |= {} if scale is None else {"scale": scale}
    torch.testing.assert_close(exact(read_call(q, k, v, 4, **options)), standins.attention(q, k, v, 4, **options))


def test_a_value_that_is_cut_into_heads_is_taken_as_it_is():
    # As Stable Diffusion 3 passes it.
    q, k = torch.randn(2, 2, 7, 32)
    v = torch.randn(2, 7, 4, 8)
    expected = standins.attention(q, k, v.flatten(2), 4)
    torch.testing.assert_close(exact(read_call(q, k, v, 4)), expected)


def test_mask_and_heads_are_found_by_position_and_by_name():
    x, mask = torch.randn(1, 5, 8), torch.zeros(5, 5)
    assert read_call(x, x, x, 2, mask).mask is mask
    by_name = read_call(x, x, x, heads=2, mask=mask, transformer_options={}, _inside_attn_wrapper=True)
    assert (by_name.mask is mask, by_name.heads) == (True, 2)


def test_a_call_says_whether_it_may_be_approximated():
    x = torch.randn(1, 5, 8)
    assert read_call(x, x, x, 2).low_precision_attention
    assert not read_call(x, x, x, 2, low_precision_attention=False).low_precision_attention


@pytest.mark.parametrize("skip_reshape", [False, True])
def test_attention_to_fewer_tokens_is_cross_attention(skip_reshape):
    shape = (1, 2, 9, 8) if skip_reshape else (1, 9, 16)
    query, longer = torch.randn(shape), torch.randn(*shape[:-2], 12, shape[-1])
    options = {"heads": 2, "skip_reshape": skip_reshape}
    assert read_call(longer, query, query, **options).is_cross_attention
    assert not read_call(query, query, query, **options).is_cross_attention
    assert not read_call(query, longer, longer, **options).is_cross_attention

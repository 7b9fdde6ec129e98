from __future__ import annotations

import math

import pytest
import torch
from tiny_models import TINY
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffsparse.call_flops import CallFlops

MODELS = ("wan", "hunyuan_video", "cogvideox", "ltx", "flux", "qwen_image")


@pytest.mark.parametrize("name", MODELS)
def test_all_that_torch_counts_is_counted(name):
    tiny = TINY[name]
    model = tiny.make()
    call = tiny.call(model, tiny.grid)
    counted = CallFlops.of(model, tiny.layers, call)
    # Of the mathematical attention torch counts the two products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as torchs:
        model(**call)
    assert counted.other + sum(flops for _, flops in counted.attention) == torchs.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_self_attention_is_told_from_the_rest(name):
    tiny = TINY[name]
    model = tiny.make()
    counted = CallFlops.of(model, tiny.layers, tiny.call(model, tiny.grid))
    tokens = tiny.text_before + math.prod(tiny.grid) + (tiny.text_after or 0)
    assert counted.attention == [((1, 2, tokens, 32), 4 * tokens**2 * 32 * 2)] * len(tiny.layers)


def test_the_model_is_left_as_it_was():
    model = TINY["wan"].make()
    call = TINY["wan"].call(model, (3, 7, 5))
    before = model(**call)[0]
    CallFlops.of(model, TINY["wan"].layers, call)
    assert isinstance(before, Tensor)
    assert torch.equal(model(**call)[0], before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_size_that_the_transformer_has_no_rotary_embedding_for_is_said():
    model = TINY["wan"].make()
    call = TINY["wan"].call(model, (1, 1, model.config.rope_max_seq_len + 1))
    with pytest.raises(
        ValueError, match=r"^WanTransformer3DModel takes no call of this size \(.*\)\. Name a smaller one"
    ):
        CallFlops.of(model, TINY["wan"].layers, call)

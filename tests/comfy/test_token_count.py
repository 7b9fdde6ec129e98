from __future__ import annotations

import comfy_standins as standins
import pytest
import torch
from torch import nn

from diffsparse.comfy.models import find_model
from diffsparse.comfy.token_count import TokenCount, count_tokens


def test_operations_are_counted():
    model = standins.WanModel(layers=2, width=32)
    count = count_tokens(model, find_model(model), torch.zeros(1, 4, 5, 20, 16), 0.25)
    tokens = 5 * 10 * 8
    attention = 2 * 4 * tokens * tokens * 32
    # Eight projections of 32 by 32 in each of two blocks.
    other = 2 * tokens * 2 * 8 * 32 * 32
    assert count.num_tokens == tokens
    assert count.attention_share == pytest.approx(attention / (attention + other))


def test_heads_that_are_wider_than_the_model_are_counted_as_they_are():
    block = nn.ModuleDict({"attn": nn.ModuleDict({"out_proj": nn.Linear(56, 42, bias=False)})})
    model = type("MiniMaxH3Model", (nn.Module,), {"hidden_size": 42, "patch_size": (1, 2, 2)})()
    model.blocks = nn.ModuleList([block])
    count = count_tokens(model, find_model(model), [torch.zeros(1, 24, 5, 20, 16), torch.zeros(1, 32, 2, 9)], 0.25)
    tokens = 5 * 10 * 8
    attention, other = 4 * tokens * tokens * 56, 2 * tokens * 56 * 42
    assert count.attention_share == pytest.approx(attention / (attention + other))


def test_weights_in_four_bits_are_counted_as_they_were():
    class Packed(torch.Tensor):
        @property
        def shape(self):
            return torch.Size((32, 32))

    model = standins.WanModel(layers=2, width=32)
    latents = torch.zeros(1, 4, 5, 20, 16)
    expected = count_tokens(model, find_model(model), latents, 0.25)
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            packed = torch.zeros(32, 18, dtype=torch.uint8).as_subclass(Packed)
            module.weight = nn.Parameter(packed, requires_grad=False)
    assert count_tokens(model, find_model(model), latents, 0.25) == expected


def test_a_speed_up_is_what_amdahl_says():
    half = TokenCount(1, 1, 1, attention_share=0.5, density=0.5)
    assert half.speed_up == pytest.approx(4 / 3)
    assert TokenCount(1, 1, 1, attention_share=0.9, density=1.0).speed_up == 1


def test_the_text_names_the_grid_and_says_that_nothing_was_measured():
    text = str(TokenCount(21, 30, 52, attention_share=0.61, density=0.25))
    assert text.splitlines() == [
        "32,760 tokens: 21 x 30 x 52 (frames, height, width)",
        "Attention is 61 % of the work of a step.",
        "Computing 25 % of it makes a sparse step at most 1.84 times as fast (counted, not measured).",
    ]

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
    # Six projections of 32 by 32 in each of two blocks: keys and values of cross-attention are of text.
    other = 2 * tokens * 2 * 6 * 32 * 32
    assert count.num_tokens == tokens
    assert count.attention_share == pytest.approx(attention / (attention + other))


def test_weights_of_text_and_sound_and_of_the_step_are_not_counted():
    def count(names):
        block = nn.Module()
        block.named_parameters = lambda **kwargs: ((f"{name}.weight", torch.empty(32, 32)) for name in names)
        model = type("Flux", (nn.Module,), {"hidden_size": 32, "patch_size": 2})()
        model.double_blocks = nn.ModuleList([block])
        return count_tokens(model, find_model(model), torch.zeros(1, 16, 20, 16), 0.25)

    # As they are called in ComfyUI's models.
    met = ["img_attn.qkv", "img_mlp.0", "linear1", "attn.to_k", "self_attn.k", "cross_attn.q", "cross_attn.o", "ffn.0"]
    met += ["attn1.to_v", "attn2.to_q", "cross_attention.to_query", "cross_attn.output_proj", "attn.qkv_x", "mlp_x.w1"]
    met += ["attention.qkv", "feed_forward.w1", "attn_out", "ff_proj", "x_block.attn.qkv", "attn.w2q", "mlp.c_fc1"]
    met += [
        "block.attn1.to_out",
        "block.ff_i.experts.1.w1",
        "block.ff_i.shared_experts.w2",
        "img_instruct_attn.to_out.0",
    ]
    met += ["img_instruct_attn.processor.img_to_q", "img_self_attn.to_k", "attn.wk", "mlp.down", "attn.img_attn_proj"]
    others = ["txt_attn.qkv", "txt_mlp.0", "img_mod.lin", "txt_mod.1", "modulation.lin", "visual_modulation.out_layer"]
    others += ["adaLN_modulation.1", "adaln_proj.linear", "norm1.linear", "mod_x", "attn.qkv_y", "mlp_y.w1"]
    others += [
        "audio_ff.net.2",
        "video_to_audio_attn.to_q",
        "attn.add_k_proj",
        "attn.to_add_out",
        "cross_attn.k",
        "cross_attn.v_img",
    ]
    others += ["cross_attn.k_proj", "cross_attention.to_value", "attn2.to_v", "context_block.attn.qkv", "mlpC.c_fc1"]
    others += ["block.attn1.to_q_t", "block.attn1.to_out_t", "block.ff_t.w1", "block.ff_i.experts.2.w1"]
    others += ["img_instruct_attn.processor.instruct_to_q", "instruct_feed_forward.linear_1"]
    attention, projection = 4 * 80 * 80 * 32, 2 * 80 * 32 * 32
    for name in met:
        assert count([name]).attention_share == pytest.approx(attention / (attention + projection)), name
    assert count(others).attention_share == 1


def test_compiled_blocks_are_counted_as_they_were():
    model = standins.WanModel(layers=2, width=32)
    latents = torch.zeros(1, 4, 5, 20, 16)
    expected = count_tokens(model, find_model(model), latents, 0.25)
    for layer, block in enumerate(model.blocks):
        model.blocks[layer] = torch.compile(block, backend="eager")
    assert count_tokens(model, find_model(model), latents, 0.25) == expected


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

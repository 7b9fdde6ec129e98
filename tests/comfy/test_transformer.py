from __future__ import annotations

import comfy_standins as standins
import pytest
import torch

from diffsparse.comfy.models import find_model
from diffsparse.comfy.transformer import SampledTransformer
from diffsparse.config import SparseAttentionConfig
from diffsparse.pipelines.family import Layout
from diffsparse.session import LayerTally
from diffsparse.steps import Step
from diffsparse.strategies.adaptive import Adaptive


def call(transformer, module, step, size):
    """One call of the model at a step, for a region of this size."""
    frames, height, width = size
    transformer.begin_call(Step(step, 20, "prompt", False), Layout(*size), None)
    options = {"optimized_attention_override": transformer.override}
    with torch.no_grad():
        module(torch.randn(1, 4, frames, 2 * height, 2 * width), torch.ones(1), torch.randn(1, 6, 32), None, options)


def test_regions_of_different_size_keep_their_plans(monkeypatch):
    made = []
    plan = Adaptive.plan
    monkeypatch.setattr(Adaptive, "plan", lambda *args: made.append(args) or plan(*args))
    module = standins.WanModel(layers=2)
    transformer = SampledTransformer(module, find_model(module), SparseAttentionConfig(dense_steps=0.0, min_tokens=0))
    for step in range(3):
        for size in ((3, 7, 5), (3, 6, 6)):
            call(transformer, module, step, size)
    # Once for each size and layer.
    assert len(made) == 4
    assert sum(tally.sparse_calls for tally in transformer.session.tallies) == 12


def test_a_block_that_is_told_options_keeps_them():
    module = standins.WanModel(layers=1)
    SampledTransformer(module, find_model(module), SparseAttentionConfig())
    seen, options, (block,) = [], {}, module.blocks
    block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    inputs = torch.randn(1, 6, 32), torch.randn(1, 6, 32)
    with torch.no_grad():
        block(*inputs, options)
        block(*inputs, transformer_options=options)
    assert seen[0] == ((*inputs, options), {})
    assert seen[0][0][2] is options
    assert seen[1][1]["transformer_options"] is options


@pytest.mark.parametrize("by_position", [True, False])
def test_a_block_that_is_told_to_attend_to_nothing_counts_for_nothing(by_position):
    module = standins.WanModel(layers=2)
    for block in module.blocks:
        block.self_attn.forward = lambda x, **kwargs: x
    transformer = SampledTransformer(module, find_model(module), SparseAttentionConfig(strict=True, min_tokens=0))
    transformer.begin_call(Step(1, 20, "prompt", False), Layout(3, 5, 4), None)
    options = {"optimized_attention_override": transformer.override, "stg_skip_self_attn": True}
    # What it attends to besides is longer than the sequence, as a video is than its sound.
    tokens, others = torch.randn(1, 60, 32), torch.randn(1, 70, 32)
    with torch.no_grad():
        for block in module.blocks:
            if by_position:
                block(tokens, others, options)
            else:
                block(tokens, others, transformer_options=options)
    assert transformer.session.tallies == [LayerTally(), LayerTally()]


def test_a_block_that_attends_to_nothing_does_not_go_by_the_length_of_the_block_before():
    module = standins.WanModel(layers=2)
    transformer = SampledTransformer(module, find_model(module), SparseAttentionConfig(dense_steps=0.0, min_tokens=0))
    transformer.begin_call(Step(1, 20, "prompt", False), Layout(3, 5, 4), None)
    options = {"optimized_attention_override": transformer.override}
    tokens, others = torch.randn(1, 60, 32), torch.randn(1, 70, 32)
    module.blocks[1].self_attn.forward = lambda x, **kwargs: x
    with torch.no_grad():
        module.blocks[0](tokens, others, options)
        # What it attends to besides is as long as the sequence.
        module.blocks[1](tokens, tokens, options | {"stg_skip_self_attn": True})
    assert [tally.sparse_calls for tally in transformer.session.tallies] == [1, 0]


def test_what_was_put_on_the_blocks_is_taken_away():
    module = standins.WanModel()
    transformer = SampledTransformer(module, find_model(module), SparseAttentionConfig())
    assert all(block._forward_hooks and block._forward_pre_hooks for block in module.blocks)
    transformer.remove()
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in module.blocks)

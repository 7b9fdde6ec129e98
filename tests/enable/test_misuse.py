"""What cannot be enabled, and what is said of it."""

import diffusers
import pytest
import torch
from diffusers.modular_pipelines import WanBlocks
from enabled import SPARSE, config, report_of, surroundings
from tiny_models import generate, tiny_wan_pipeline

import diffsparse
from diffsparse.strategies.dense import Dense


def test_enabling_twice_is_an_error_that_says_so(pipeline):
    for thing in (pipeline, pipeline.transformer):
        thing.enable_sparse_attention(SPARSE)
        with pytest.raises(ValueError, match=r"already enabled on .*disable_sparse_attention"):
            pipeline.enable_sparse_attention("fast")
        thing.disable_sparse_attention()


def test_an_expert_that_is_enabled_already_leaves_the_other_alone():
    pipeline = tiny_wan_pipeline(two_experts=True)
    pipeline.transformer_2.enable_sparse_attention(SPARSE)
    before = surroundings(pipeline.transformer)
    with pytest.raises(ValueError, match="transformer_2"):
        pipeline.enable_sparse_attention(SPARSE)
    assert surroundings(pipeline.transformer) == before


def test_a_transformer_under_two_names_is_one(pipeline, warnings):
    stock = generate(pipeline)
    pipeline.register_modules(transformer_2=pipeline.transformer)
    before = surroundings(pipeline.transformer)
    pipeline.enable_sparse_attention(SPARSE)
    assert warnings() == []
    generate(pipeline)
    assert report_of(pipeline).sparse_calls == 3 * 2 * 2
    pipeline.disable_sparse_attention()
    assert surroundings(pipeline.transformer) == before
    assert torch.equal(generate(pipeline), stock)


def test_disabling_when_off_is_a_warning(pipeline, warnings):
    pipeline.disable_sparse_attention()
    assert ["not enabled" in warning for warning in warnings()] == [True]


def test_wrong_things_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"names no preset.*'turbo'"):
        pipeline.enable_sparse_attention("turbo")
    with pytest.raises(TypeError, match="SparseAttentionConfig"):
        pipeline.enable_sparse_attention(Dense())
    with pytest.raises(TypeError, match="pipeline or a transformer, got str"):
        diffsparse.enable_sparse_attention("Wan-AI/Wan2.1")
    with pytest.raises(ValueError, match="not enabled"):
        pipeline.sparse_attention_report()
    with pytest.raises(ValueError, match=r"`dense_layers`.*layer 7.*2 self-attention layers"):
        pipeline.enable_sparse_attention(config(dense_layers=(7,)))
    assert not pipeline.is_sparse_attention_enabled
    assert surroundings(pipeline.transformer) == surroundings(tiny_wan_pipeline().transformer)


def test_a_pipeline_without_a_transformer_is_refused(pipeline):
    pipeline.transformer = None
    for unloaded in (pipeline, WanBlocks().init_pipeline()):
        with pytest.raises(ValueError, match=r"`transformer` is None: load it.* by `load_components\(\)`"):
            unloaded.enable_sparse_attention()


def test_a_pipeline_without_a_transformer_can_be_asked_but_not_enabled():
    pipeline = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
        diffusers.DDPMScheduler(),
    )
    assert not pipeline.is_sparse_attention_enabled
    with pytest.raises(ValueError, match=r"no diffusion transformer.* not a UNet"):
        pipeline.enable_sparse_attention()

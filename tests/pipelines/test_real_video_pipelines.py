"""diffusers' own video pipelines around tiny transformers: what they really pass runs every layer sparse."""

import diffusers
import pytest
import torch
from enabled import Watched, config, report_of
from PIL import Image
from tiny.model import TEXT_TOKENS
from tiny_models import TINY, tiny_wan_pipeline
from tiny_pipelines import prompts, text, with_wans_encoders, without_encoders

from diffsparse.grid import TokenGrid

SIZE = {"height": 48, "width": 80, "num_frames": 9}
"""Three latent frames of 6 x 10 where the VAE compresses by 4 in time and by 8 in space."""


def wan_vace():
    parts = tiny_wan_pipeline().components
    transformer = TINY["wan_vace"].make(in_channels=16, out_channels=16, vace_in_channels=96)
    pipeline = diffusers.WanVACEPipeline(**(parts | {"transformer": transformer}))
    call = prompts(prompt_embeds=text()) | SIZE | {"reference_images": [Image.new("RGB", (80, 48))]}
    # The reference image is a frame before the three of the video.
    return pipeline, call, {TokenGrid(4, 3, 5)}


def skyreels_v2():
    pipeline = with_wans_encoders(
        diffusers.SkyReelsV2Pipeline,
        transformer=TINY["skyreels_v2"].make(in_channels=16, out_channels=16),
        scheduler=diffusers.UniPCMultistepScheduler(),
    )
    return pipeline, prompts(prompt_embeds=text()) | SIZE, {TokenGrid(3, 3, 5)}


def mochi():
    pipeline = without_encoders(
        diffusers.MochiPipeline,
        transformer=TINY["mochi"].make(in_channels=12),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    )
    call = {"prompt_embeds": text(), "prompt_attention_mask": torch.arange(TEXT_TOKENS)[None] < 4}
    call |= {"negative_prompt_embeds": text(), "negative_prompt_attention_mask": torch.arange(TEXT_TOKENS)[None] < 2}
    # Guidance is a batch of two rows, which have as many tokens as their prompts.
    grids = {TokenGrid(3, 3, 5, text_after=tokens) for tokens in (4, 2)}
    return pipeline, call | SIZE | {"num_frames": 13}, grids


def hunyuan_video15():
    pipeline = without_encoders(
        diffusers.HunyuanVideo15Pipeline,
        transformer=TINY["hunyuan_video15"].make(in_channels=65, out_channels=32),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            block_out_channels=(4, 4, 4, 4, 4), layers_per_block=1, latent_channels=32
        ),
        guider=diffusers.guiders.ClassifierFreeGuidance(guidance_scale=4.0),
    )
    call = prompts(
        prompt_embeds=text(),
        prompt_embeds_mask=(torch.arange(TEXT_TOKENS)[None] < 4).long(),
        prompt_embeds_2=text(5, 8),
        prompt_embeds_mask_2=(torch.arange(5)[None] < 2).long(),
    )
    # The VAE compresses by 16; 729 tokens of an image that is not there.
    grid = TokenGrid(3, 3, 5, text_after=729 + 5 + TEXT_TOKENS)
    return pipeline, call | SIZE, {grid}


def kandinsky5():
    pipeline = without_encoders(
        diffusers.Kandinsky5T2VPipeline,
        transformer=TINY["kandinsky5"].make(in_visual_dim=16, out_visual_dim=16),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    call = prompts(prompt_embeds_qwen=text(), prompt_embeds_clip=torch.randn(1, 8))
    lengths = torch.tensor([0, TEXT_TOKENS], dtype=torch.int32)
    call |= {"prompt_cu_seqlens": lengths, "negative_prompt_cu_seqlens": lengths}
    return pipeline, call | SIZE, {TokenGrid(3, 3, 5)}


def easyanimate():
    pipeline = without_encoders(
        diffusers.EasyAnimatePipeline,
        vae=diffusers.AutoencoderKLMagvit(
            block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2
        ),
        transformer=TINY["easyanimate"].make(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    call = prompts(prompt_embeds=text(), prompt_attention_mask=torch.ones(1, TEXT_TOKENS))
    return pipeline, call | SIZE, {TokenGrid(3, 3, 5, text_before=TEXT_TOKENS)}


def allegro():
    pipeline = without_encoders(
        diffusers.AllegroPipeline,
        # Its rotary embedding is of three equal parts.
        transformer=TINY["allegro"].make(attention_head_dim=24, cross_attention_dim=48),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(),
    )
    call = prompts(prompt_embeds=text(), prompt_attention_mask=torch.ones(1, TEXT_TOKENS))
    return pipeline, call | SIZE | {"negative_prompt": None}, {TokenGrid(3, 3, 5)}


def helios():
    pipeline = with_wans_encoders(
        diffusers.HeliosPipeline,
        transformer=TINY["helios"].make(in_channels=16, out_channels=16),
        scheduler=diffusers.HeliosScheduler(stages=1),
    )
    call = prompts(prompt_embeds=text()) | SIZE
    call |= {"history_sizes": [4, 2, 1], "num_latent_frames_per_chunk": 3, "num_frames": 21}
    # Four frames in patches of 8 x 8, two in 4 x 4, the last one and the first in 2 x 2.
    return pipeline, call, {TokenGrid(3, 3, 5, text_before=1 * 2 + 2 * 3 + 2 * 3 * 5)}


def anyflow():
    pipeline = with_wans_encoders(
        diffusers.AnyFlowPipeline,
        transformer=TINY["anyflow"].make(in_channels=16, out_channels=16),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(),
    )
    return pipeline, prompts(prompt_embeds=text()) | SIZE, {TokenGrid(3, 3, 5)}


PIPELINES = [wan_vace, skyreels_v2, mochi, hunyuan_video15, kandinsky5, easyanimate, allegro, helios, anyflow]


@pytest.mark.parametrize("make", PIPELINES)
def test_every_call_of_the_pipeline_runs_every_layer_sparse(make):
    pipeline, call, expected = make()
    pipeline.set_progress_bar_config(disable=True)
    # Strict: any fallback to dense is an error here.
    pipeline.enable_sparse_attention(config(strategy := Watched(density=0.5), strict=True))
    pipeline(**call, num_inference_steps=2, output_type="latent")
    assert {call.grid for call in strategy.calls} == expected
    assert report_of(pipeline).dense_calls == 0

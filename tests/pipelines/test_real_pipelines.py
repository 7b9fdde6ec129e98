"""diffusers' own pipelines around tiny transformers: what they really pass is enough to run every layer sparse."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from enabled import Watched, config, report_of
from tiny.model import TEXT_TOKENS
from tiny_models import TINY, tiny_wan_pipeline
from tiny_pipelines import prompts, text, tiny_flux_pipeline, without_encoders

from diffsparse.grid import TokenGrid

STEPS = 3


VIDEO = {"height": 48, "width": 80, "num_frames": 9}
"""Three latent frames of 6 x 10 where the VAE compresses by 4 in time and by 8 in space."""
IMAGE = {"height": 7 * 16, "width": 5 * 16}


def flow_pipeline(pipeline_class, name, **changes):
    """A pipeline around a tiny transformer, with the scheduler that most of them have."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return without_encoders(pipeline_class, transformer=TINY[name].make(**changes), scheduler=scheduler)


def wan_image_to_video():
    parts = tiny_wan_pipeline().components
    transformer = TINY["wan"].make(in_channels=16 + 4 + 16, out_channels=16)
    pipeline = diffusers.WanImageToVideoPipeline(**(parts | {"transformer": transformer}))
    call = VIDEO | prompts(prompt_embeds=text()) | {"image": torch.rand(1, 3, 48, 80)}
    return pipeline, call, TokenGrid(3, 3, 5)


def wan_clean_first_frame():
    # Wan 2.2 5B: one model for text and for images, a timestep for each token.
    parts = tiny_wan_pipeline().components | {"expand_timesteps": True}
    pipeline = diffusers.WanImageToVideoPipeline(**parts)
    call = VIDEO | prompts(prompt_embeds=text()) | {"image": torch.rand(1, 3, 48, 80)}
    return pipeline, call, TokenGrid(3, 3, 5)


def hunyuan_video(true_cfg=False):
    pipeline = flow_pipeline(diffusers.HunyuanVideoPipeline, "hunyuan_video")
    mask = (torch.arange(TEXT_TOKENS) < 4)[None].long()
    prompt = {"prompt_embeds": text(), "pooled_prompt_embeds": torch.randn(1, 8), "prompt_attention_mask": mask}
    call = VIDEO | (prompts(**prompt) | {"true_cfg_scale": 2.0} if true_cfg else prompt)
    return pipeline, call, TokenGrid(3, 3, 5, text_after=TEXT_TOKENS)


def hunyuan_video_true_cfg():
    return hunyuan_video(true_cfg=True)


def cogvideox():
    pipeline = without_encoders(
        diffusers.CogVideoXPipeline,
        transformer=TINY["cogvideox"].make(sample_height=6, sample_width=10),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    return pipeline, VIDEO | prompts(prompt_embeds=text()), TokenGrid(3, 3, 5, text_before=TEXT_TOKENS)


def cogvideox_1_5():
    pipeline, call, _ = cogvideox()
    pipeline.transformer = TINY["cogvideox"].make(
        sample_height=6,
        sample_width=10,
        patch_size_t=2,
        patch_bias=False,
        use_rotary_positional_embeddings=True,
    )
    # Three latent frames become four, and two after patching.
    return pipeline, call, TokenGrid(2, 3, 5, text_before=TEXT_TOKENS)


def ltx():
    pipeline = flow_pipeline(diffusers.LTXPipeline, "ltx")
    call = prompts(prompt_embeds=text(), prompt_attention_mask=torch.ones(1, TEXT_TOKENS))
    return pipeline, call | {"height": 96, "width": 160, "num_frames": 17}, TokenGrid(3, 3, 5)


def flux(pipeline_class=diffusers.FluxPipeline):
    pipeline = tiny_flux_pipeline(pipeline_class)
    call = IMAGE | {"prompt_embeds": text(), "pooled_prompt_embeds": torch.randn(1, 8)}
    return pipeline, call, TokenGrid(1, 7, 5, text_before=TEXT_TOKENS)


def flux_true_cfg():
    pipeline, call, grid = flux()
    call |= {"negative_prompt_embeds": text(), "negative_pooled_prompt_embeds": torch.randn(1, 8)}
    return pipeline, call | {"true_cfg_scale": 2.0}, grid


def flux_kontext():
    pipeline, call, _ = flux(diffusers.FluxKontextPipeline)
    pipeline.vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=1,
        norm_num_groups=2,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipeline.vae_scale_factor = 8
    call |= {"image": torch.rand(1, 3, 48, 64), "max_area": 112 * 80, "_auto_resize": False}
    return pipeline, call, TokenGrid(1, 7, 5, text_before=TEXT_TOKENS, text_after=3 * 4)


def sd3():
    pipeline = flow_pipeline(diffusers.StableDiffusion3Pipeline, "sd3")
    call = IMAGE | prompts(prompt_embeds=text(), pooled_prompt_embeds=torch.randn(1, 8))
    return pipeline, call, TokenGrid(1, 7, 5, text_after=TEXT_TOKENS)


def qwen_image():
    pipeline = flow_pipeline(diffusers.QwenImagePipeline, "qwen_image")
    mask = torch.ones(1, TEXT_TOKENS, dtype=torch.bool)
    call = IMAGE | prompts(prompt_embeds=text(), prompt_embeds_mask=mask)
    return pipeline, call, TokenGrid(1, 7, 5, text_before=TEXT_TOKENS)


def qwen_image_prompts_of_different_length():
    pipeline, call, _ = qwen_image()
    mask = torch.arange(TEXT_TOKENS) < torch.tensor([[TEXT_TOKENS], [4]])
    call |= prompts(prompt_embeds=text().expand(2, -1, -1), prompt_embeds_mask=mask)
    return pipeline, call, TokenGrid(1, 7, 5, text_after=TEXT_TOKENS)


def krea2():
    pipeline = flow_pipeline(diffusers.Krea2Pipeline, "krea2")
    # A prompt, its padding, and what the template says behind it.
    mask = torch.tensor([[True, True, False, False, False, True, True]])
    call = IMAGE | prompts(prompt_embeds=text()[:, :, None].expand(-1, -1, 3, -1), prompt_embeds_mask=mask)
    return pipeline, call, TokenGrid(1, 7, 5, text_after=TEXT_TOKENS)


def bria_fibo():
    pipeline = flow_pipeline(diffusers.BriaFiboPipeline, "bria_fibo")

    def get_prompt_embeds(prompt, **_):
        embeddings = text(len(prompt[0]))
        return embeddings, [embeddings] * 4, torch.ones(embeddings.shape[:2])

    pipeline.get_prompt_embeds, pipeline.text_encoder = get_prompt_embeds, SimpleNamespace(dtype=torch.float32)
    call = {"prompt": "p" * TEXT_TOKENS, "negative_prompt": "n" * 4}
    return pipeline, IMAGE | call, TokenGrid(1, 7, 5, text_after=TEXT_TOKENS)


def joyimage_edit_plus():
    pipeline = without_encoders(
        diffusers.JoyImageEditPlusPipeline,
        transformer=TINY["joyimage_edit_plus"].make(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        processor=None,
    )

    def encode_prompt(prompt, **_):
        tokens = TEXT_TOKENS if "a cat" in prompt[0] else 4
        return text(tokens), torch.ones(1, tokens, dtype=torch.long)

    pipeline.encode_prompt_multiple_images = encode_prompt
    return pipeline, IMAGE | {"prompt": "a cat"}, TokenGrid(1, 7, 5, text_after=TEXT_TOKENS)


def nucleus_image():
    pipeline = without_encoders(
        diffusers.NucleusMoEImagePipeline,
        transformer=TINY["nucleus_image"].make(in_channels=16, out_channels=4, patch_size=2),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        processor=None,
    )
    mask = torch.arange(TEXT_TOKENS)[None] < 4
    call = IMAGE | prompts(prompt_embeds=text(), prompt_embeds_mask=mask)
    return pipeline, call, TokenGrid(1, 7, 5, text_after=TEXT_TOKENS)


def prx():
    pipeline = flow_pipeline(diffusers.PRXPipeline, "prx", in_channels=16)
    mask = torch.arange(TEXT_TOKENS)[None] < 4
    call = IMAGE | prompts(prompt_embeds=text(), prompt_attention_mask=mask) | {"use_resolution_binning": False}
    return pipeline, call, TokenGrid(1, 7, 5, text_after=TEXT_TOKENS)


def z_image():
    pipeline = flow_pipeline(diffusers.ZImagePipeline, "z_image", n_refiner_layers=1)
    call = IMAGE | prompts(prompt_embeds=[text()[0]])
    # Image and caption are filled up to 64 and 32 tokens.
    return pipeline, call, TokenGrid(1, 7, 5, text_after=64 - 35 + 32)


def flux2():
    pipeline = flow_pipeline(diffusers.Flux2Pipeline, "flux2")
    return pipeline, IMAGE | {"prompt_embeds": text()}, TokenGrid(1, 7, 5, text_before=TEXT_TOKENS)


def cogview4():
    pipeline = flow_pipeline(diffusers.CogView4Pipeline, "cogview4")
    return pipeline, IMAGE | prompts(prompt_embeds=text()), TokenGrid(1, 7, 5, text_before=TEXT_TOKENS)


def auraflow():
    pipeline = flow_pipeline(diffusers.AuraFlowPipeline, "auraflow")
    call = IMAGE | prompts(prompt_embeds=text(), prompt_attention_mask=torch.ones(1, TEXT_TOKENS))
    return pipeline, call, TokenGrid(1, 7, 5, text_before=8 + TEXT_TOKENS)


def lumina2():
    pipeline = flow_pipeline(diffusers.Lumina2Pipeline, "lumina2")
    call = IMAGE | prompts(prompt_embeds=text(), prompt_attention_mask=torch.arange(TEXT_TOKENS)[None] < 4)
    return pipeline, call, TokenGrid(1, 7, 5, text_before=4)


PIPELINES = [
    wan_image_to_video,
    wan_clean_first_frame,
    hunyuan_video,
    hunyuan_video_true_cfg,
    cogvideox,
    cogvideox_1_5,
    ltx,
    flux,
    flux_true_cfg,
    flux_kontext,
    sd3,
    qwen_image,
    qwen_image_prompts_of_different_length,
    krea2,
    bria_fibo,
    joyimage_edit_plus,
    nucleus_image,
    prx,
    z_image,
    flux2,
    cogview4,
    auraflow,
    lumina2,
]


@pytest.mark.parametrize("make", PIPELINES)
def test_every_call_of_the_pipeline_says_the_grid(make):
    pipeline, call, grid = make()
    pipeline.set_progress_bar_config(disable=True)
    # Strict: any fallback to dense is an error here.
    pipeline.enable_sparse_attention(config(strategy := Watched(density=0.5), dense_steps=0.34, strict=True))
    for _ in range(2):
        pipeline(**call, num_inference_steps=STEPS, output_type="latent")
    # Some layers see the grid without its text.
    grids = {call.grid for call in strategy.calls}
    assert grid in grids
    assert {grid, TokenGrid(grid.frames, grid.height, grid.width)} >= grids
    report = report_of(pipeline)
    calls_per_step = (report.sparse_calls + report.dense_calls) / (2 * STEPS * report.num_layers)
    assert calls_per_step in (1, 2)
    # One of three steps is dense, in both generations.
    assert report.sparse_calls == 2 * 2 * report.num_layers * calls_per_step
    assert set(report.dense_reasons) == {"early step"}

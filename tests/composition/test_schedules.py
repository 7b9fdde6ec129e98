"""Schedulers of first and second order, and generations that begin in the middle of the schedule."""

import diffusers
import pytest
import torch
from enabled import FULL, Watched, config, report_of
from PIL import Image
from tiny_models import TINY, generate, tiny_wan_pipeline
from tiny_pipelines import generate_image, text, tiny_flux_pipeline, with_wans_encoders, without_encoders

LAYERS, BRANCHES = 2, 2


def flow(scheduler):
    return scheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


# Each with the evaluations that it makes of the transformer in five steps.
SCHEDULERS = {
    "Euler": (lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 5),
    "UniPC": (lambda: flow(diffusers.UniPCMultistepScheduler), 5),
    "DPM-Solver++, multistep": (lambda: flow(diffusers.DPMSolverMultistepScheduler), 5),
    "DPM-Solver++, singlestep": (lambda: flow(diffusers.DPMSolverSinglestepScheduler), 5),
    "Heun": (lambda: diffusers.FlowMatchHeunDiscreteScheduler(), 2 * 5 - 1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_evaluation_of_the_transformer_is_a_step_whatever_the_order_of_the_scheduler(name):
    scheduler, evaluations = SCHEDULERS[name]
    pipeline = tiny_wan_pipeline()
    pipeline.scheduler = scheduler()
    stock = generate(pipeline, steps=5)
    pipeline.enable_sparse_attention(FULL)
    torch.testing.assert_close(generate(pipeline, steps=5), stock)
    assert report_of(pipeline).sparse_calls == evaluations * BRANCHES * LAYERS
    pipeline.disable_sparse_attention()
    pipeline.enable_sparse_attention(config(dense_steps=0.4))
    for generations in (1, 2):
        generate(pipeline, steps=5)
        early = round(0.4 * evaluations)
        assert report_of(pipeline).dense_reasons == {"early step": generations * early * BRANCHES * LAYERS}
        assert report_of(pipeline).sparse_calls == generations * (evaluations - early) * BRANCHES * LAYERS


def from_red_video(pipeline, strength):
    return pipeline(
        video=[Image.new("RGB", (80, 48), "red")] * 5,
        prompt_embeds=text(),
        negative_prompt_embeds=-text(),
        height=48,
        width=80,
        num_inference_steps=10,
        strength=strength,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames


def video_to_video(strength):
    pipeline = with_wans_encoders(
        diffusers.WanVideoToVideoPipeline,
        transformer=TINY["wan"].make(in_channels=16, out_channels=16, num_layers=LAYERS),
        scheduler=flow(diffusers.UniPCMultistepScheduler),
    )
    return pipeline, lambda: from_red_video(pipeline, strength), BRANCHES * LAYERS


def image_to_image(strength):
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=1,
        shift_factor=0.0,
    )
    pipeline = tiny_flux_pipeline(diffusers.FluxImg2ImgPipeline, vae=vae)

    def run():
        return generate_image(pipeline, steps=10, strength=strength, image=Image.new("RGB", (80, 112), "red"))

    return pipeline, run, 4


def without_step_index(strength):
    pipeline = without_encoders(
        diffusers.CogVideoXVideoToVideoPipeline,
        transformer=TINY["cogvideox"].make(sample_height=6, sample_width=10),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        vae=diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2
        ),
    )

    return pipeline, lambda: from_red_video(pipeline, strength), 3


@pytest.mark.parametrize("make", [video_to_video, image_to_image])
@pytest.mark.parametrize(("strength", "early"), [(0.5, 0), (0.9, 2)])
def test_early_steps_are_those_of_the_whole_schedule(make, strength, early):
    pipeline, run, calls_per_step = make(strength)
    stock = run()
    pipeline.enable_sparse_attention(FULL)
    torch.testing.assert_close(run(), stock)
    assert report_of(pipeline).sparse_calls == round(10 * strength) * calls_per_step
    pipeline.disable_sparse_attention()
    # Of ten steps the first three are dense, and the generation begins with the second or the sixth.
    pipeline.enable_sparse_attention(config(dense_steps=0.3))
    run()
    assert report_of(pipeline).dense_calls == early * calls_per_step
    assert report_of(pipeline).sparse_calls == (round(10 * strength) - early) * calls_per_step


@pytest.mark.parametrize("make", [video_to_video, image_to_image, without_step_index])
@pytest.mark.parametrize(("strength", "dense_steps"), [(0.5, 0.3), (1.0, 0.3), (0.8, 0.5)])
def test_the_front_is_that_of_the_steps_that_run_sparse(make, strength, dense_steps):
    pipeline, run, _ = make(strength)
    pipeline.enable_sparse_attention(config(strategy := Watched(), dense_steps=dense_steps, replan_every=1))
    for _ in range(2):  # A pipeline that is run again knows no more than at first.
        strategy.calls.clear()
        run()
        steps = round(10 * min(strength, 1 - dense_steps))
        assert sorted({call.progress for call in strategy.calls}) == pytest.approx(
            [(step + 0.5) / steps for step in range(steps)]
        )


@pytest.mark.parametrize("distilled", [True, False])
def test_each_stage_of_a_pyramid_has_early_steps_of_its_own(distilled):
    scheduler = diffusers.HeliosDMDScheduler if distilled else diffusers.HeliosScheduler
    pipeline = with_wans_encoders(
        diffusers.HeliosPyramidPipeline,
        transformer=TINY["helios"].make(in_channels=16, out_channels=16),
        scheduler=scheduler(stages=2, stage_range=[0, 0.5, 1], gamma=0.25),
        is_distilled=distilled,
    )

    def run():
        return pipeline(
            prompt_embeds=text(),
            negative_prompt_embeds=-text(),
            # Two chunks of three latent frames, each at half the size and then at the whole.
            num_frames=18,
            num_latent_frames_per_chunk=3,
            history_sizes=[4, 2, 1],
            height=96,
            width=160,
            pyramid_num_inference_steps_list=[3, 3],
            guidance_scale=1.0 if distilled else 4.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames

    stock = run()
    pipeline.enable_sparse_attention(FULL)
    torch.testing.assert_close(run(), stock)
    pipeline.disable_sparse_attention()
    pipeline.enable_sparse_attention(config(dense_steps=1 / 3))
    run()
    calls_per_step = report_of(pipeline).num_layers * (1 if distilled else BRANCHES)
    assert report_of(pipeline).dense_reasons == {"early step": 2 * 2 * calls_per_step}
    assert report_of(pipeline).sparse_calls == 2 * 2 * 2 * calls_per_step

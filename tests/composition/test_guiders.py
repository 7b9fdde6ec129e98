"""Guiders of modular pipelines, and the layers that some of them skip."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import LayerSkipConfig
from diffusers.hooks import apply_layer_skip
from enabled import FULL, SPARSE, Watched, config, report_of, run
from tiny.model import CHANNELS
from tiny_models import TINY
from tiny_pipelines import text

from diffsparse import DenseFallback

STEPS, LAYERS = 3, 2
PERTURBED = "a torch function mode stands in for attention, as in perturbed attention guidance"


def modular_pipeline(guider=None, blocks=None, **transformers):
    blocks = blocks or diffusers.WanBlocks()
    for name in ("text_encoder", "vae_encoder", "controlnet_vae_encoder", "decode"):
        blocks.sub_blocks.pop(name, None)
    pipeline = blocks.init_pipeline()
    transformers = transformers or {"transformer": TINY["wan"].make(in_channels=16, out_channels=16, num_layers=LAYERS)}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline.update_components(**transformers, scheduler=scheduler)
    if guider is not None:
        pipeline.update_components(guider=guider)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, steps=STEPS):
    return pipeline(
        prompt_embeds=text(),
        negative_prompt_embeds=-text(),
        num_inference_steps=steps,
        num_frames=5,
        height=48,
        width=80,
        generator=torch.Generator().manual_seed(0),
        output="latents",
    )


def first_layer_skipped():
    return LayerSkipConfig(indices=[0])


# Each with the calls of the two layers that it makes in the first step, and in a later one.
GUIDERS = {
    "unguided": (lambda: diffusers.ClassifierFreeGuidance(guidance_scale=1.0), 2, 2),
    "classifier-free": (lambda: diffusers.ClassifierFreeGuidance(guidance_scale=5.0), 4, 4),
    "adaptive projected": (lambda: diffusers.AdaptiveProjectedGuidance(), 4, 4),
    "zero star": (lambda: diffusers.ClassifierFreeZeroStarGuidance(), 4, 4),
    "tangential": (lambda: diffusers.TangentialClassifierFreeGuidance(), 4, 4),
    "auto": (lambda: diffusers.AutoGuidance(auto_guidance_config=first_layer_skipped()), 3, 3),
    # These two leave the first step alone.
    "smoothed energy": (
        lambda: diffusers.SmoothedEnergyGuidance(seg_guidance_layers=[0], seg_guidance_start=0, seg_guidance_stop=1),
        4,
        6,
    ),
    "skip layer": (
        lambda: diffusers.SkipLayerGuidance(
            skip_layer_config=first_layer_skipped(), skip_layer_guidance_start=0, skip_layer_guidance_stop=1
        ),
        4,
        5,
    ),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_sparse_attention_runs_in_every_branch_of_a_guider(name):
    guider, first_calls, later_calls = GUIDERS[name]
    pipeline = modular_pipeline(guider())
    stock = generate(pipeline)
    pipeline.enable_sparse_attention(FULL)
    torch.testing.assert_close(generate(pipeline), stock)
    report = report_of(pipeline)
    assert (report.sparse_calls, report.dense_calls) == (first_calls + (STEPS - 1) * later_calls, 0)
    pipeline.disable_sparse_attention()
    pipeline.enable_sparse_attention(config(dense_steps=1 / STEPS))
    generate(pipeline)
    assert report_of(pipeline).dense_reasons == {"early step": first_calls}
    assert report_of(pipeline).sparse_calls == (STEPS - 1) * later_calls


@pytest.mark.parametrize("name", GUIDERS)
def test_plans_are_kept_from_step_to_step_in_every_branch_of_a_guider(name):
    guider, _, later_calls = GUIDERS[name]
    pipeline = modular_pipeline(guider())
    pipeline.enable_sparse_attention(config(strategy := Watched(), replan_every=STEPS))
    generate(pipeline)
    # At the most one for each layer and branch.
    assert LAYERS <= len(strategy.calls) <= later_calls


def test_each_transformer_of_modular_wan_2_2_goes_by_its_own_guider():
    transformers = {
        name: TINY["wan"].make(in_channels=16, out_channels=16, num_layers=LAYERS)
        for name in ("transformer", "transformer_2")
    }
    pipeline = modular_pipeline(blocks=diffusers.Wan22Blocks(), **transformers)
    pipeline.enable_sparse_attention(config(strategy := Watched(), dense_steps=0.5, replan_every=2))
    generate(pipeline, steps=6)
    # The first transformer runs in steps 0 and 1, the second in the others, of which one is early.
    calls = 2 * LAYERS
    first, second = pipeline.sparse_attention_report().transformers
    assert (first.sparse_calls, first.dense_reasons) == (0, {"early step": 2 * calls})
    assert (second.sparse_calls, second.dense_reasons) == (3 * calls, {"early step": calls})
    assert strategy.planned == [(layer, step) for step in (3, 5) for layer in range(LAYERS)]
    assert {call.num_steps for call in strategy.calls} == {6}


def test_modular_qwen_image_runs_sparse_with_the_masks_of_its_prompts():
    transformer = TINY["qwen_image"].make()
    pipeline = modular_pipeline(blocks=diffusers.QwenImageAutoBlocks(), transformer=transformer)
    mask = torch.ones(1, text().shape[1], dtype=torch.long)
    arguments = {"prompt_embeds": text(), "prompt_embeds_mask": mask, "height": 7 * 16, "width": 5 * 16}
    arguments |= {"negative_prompt_embeds": -text(), "negative_prompt_embeds_mask": mask.clone()}

    def generate():
        generator = torch.Generator().manual_seed(0)
        return pipeline(**arguments, num_inference_steps=STEPS, generator=generator, output="latents")

    stock = generate()
    pipeline.enable_sparse_attention(FULL)
    torch.testing.assert_close(generate(), stock)
    assert (report_of(pipeline).sparse_calls, report_of(pipeline).dense_calls) == (STEPS * 2 * LAYERS, 0)


class AudioAutoencoder(torch.nn.Module):
    """What LTX-2 asks of one that neither encodes nor decodes."""

    config = SimpleNamespace(latent_channels=CHANNELS, mel_bins=4, sample_rate=16_000, mel_hop_length=160)
    mel_compression_ratio, temporal_compression_ratio = 4, 4


def test_ltx2_guidance_runs_sparse_in_each_of_its_passes():
    if not hasattr(diffusers, "LTX2AutoBlocks"):
        pytest.skip(f"diffusers {diffusers.__version__} has no LTX2AutoBlocks")
    # That of LTX-2.3, whose second layer is left out of the pass for spatio-temporal guidance.
    transformer = TINY["ltx2"].make(gated_attn=True, audio_gated_attn=True, perturbed_attn=True)
    blocks = diffusers.LTX2AutoBlocks()
    for name in set(blocks.sub_blocks) - {"denoise"}:
        blocks.sub_blocks.pop(name)
    pipeline = modular_pipeline(blocks=blocks, transformer=transformer)
    guidance = {"guidance_scale": 3.0, "stg_scale": 1.0, "modality_scale": 2.0, "spatio_temporal_guidance_blocks": [1]}
    pipeline.update_components(
        audio_vae=AudioAutoencoder(),
        guider=diffusers.LTX2Guidance(**guidance),
        audio_guider=diffusers.LTX2Guidance(**guidance),
    )
    mask = torch.ones(1, text().shape[1])
    prompt = {
        "connector_prompt_embeds": text(),
        "connector_audio_prompt_embeds": text(),
        "connector_attention_mask": mask,
        "negative_connector_prompt_embeds": -text(),
        "negative_connector_audio_prompt_embeds": -text(),
        "negative_connector_attention_mask": mask,
    }

    def generate():
        return pipeline(
            **prompt,
            batch_size=1,
            dtype=torch.float32,
            num_inference_steps=STEPS,
            height=96,
            width=160,
            num_frames=17,
            generator=torch.Generator().manual_seed(0),
            output="latents",
        )

    stock = generate()
    pipeline.enable_sparse_attention(FULL)
    torch.testing.assert_close(generate(), stock)
    calls = 4 * report_of(pipeline).num_layers - 1
    assert (report_of(pipeline).sparse_calls, report_of(pipeline).dense_calls) == (STEPS * calls, 0)
    pipeline.disable_sparse_attention()
    pipeline.enable_sparse_attention(config(dense_steps=1 / STEPS))
    generate()
    assert report_of(pipeline).dense_reasons == {"early step": calls}
    assert report_of(pipeline).sparse_calls == (STEPS - 1) * calls


ENABLED_FIRST = pytest.mark.parametrize("enabled_first", [True, False])


def enabled_with_skipped_layer(tiny, skip, chosen, enabled_first):
    model = tiny.make()
    if enabled_first:
        model.enable_sparse_attention(chosen)
    apply_layer_skip(model, skip)
    if not enabled_first:
        model.enable_sparse_attention(chosen)
    return model


@pytest.mark.parametrize("name", ["cogview4", "pixart", "z_image"])
@ENABLED_FIRST
def test_a_layer_whose_attention_is_skipped_makes_no_call(name, enabled_first):
    tiny = TINY[name]
    call = tiny.call(tiny.make(), tiny.grid, batch=2)

    def skip():
        return LayerSkipConfig(indices=[1], skip_attention=True, skip_ff=False)

    stock = tiny.make()
    apply_layer_skip(stock, skip())
    model = enabled_with_skipped_layer(tiny, skip(), FULL, enabled_first)
    torch.testing.assert_close(run(model, call), run(stock, call))
    assert (report_of(model).sparse_calls, report_of(model).dense_calls) == (len(tiny.layers) - 1, 0)


@pytest.mark.parametrize("name", ["cogview4", "pixart", "qwen_image"])
@ENABLED_FIRST
def test_perturbed_attention_stays_perturbed_and_is_counted_dense(name, enabled_first):
    # What PAG does: values take the place of attention's output, by a torch function mode.
    tiny = TINY[name]
    call = tiny.call(tiny.make(), tiny.grid, batch=2)

    def skip():
        return LayerSkipConfig(indices=[1], skip_attention=False, skip_attention_scores=True, skip_ff=False)

    stock = tiny.make()
    plain = run(stock, call)
    apply_layer_skip(stock, skip())
    perturbed = run(stock, call)
    model = enabled_with_skipped_layer(tiny, skip(), FULL, enabled_first)
    torch.testing.assert_close(run(model, call), perturbed)
    assert not torch.allclose(perturbed, plain, atol=1e-3)
    assert report_of(model).dense_reasons == {PERTURBED: 1}
    assert report_of(model).sparse_calls == len(tiny.layers) - 1

    strict = enabled_with_skipped_layer(tiny, skip(), config(strict=True), enabled_first)
    with pytest.raises(DenseFallback, match="torch function mode"):
        run(strict, call)


def test_a_default_device_is_no_reason_to_go_dense():
    tiny = TINY["wan"]
    model = tiny.make()
    call = tiny.call(model, tiny.grid)
    model.enable_sparse_attention(SPARSE)
    with torch.device("cpu"):
        run(model, call)
    assert report_of(model).dense_calls == 0


def test_a_processor_is_known_to_guiders_and_loaders_by_its_own_class():
    model = TINY["flux"].make()
    names = [type(processor) for processor in model.attn_processors.values()]
    model.enable_sparse_attention(SPARSE)
    assert [processor.__class__ for processor in model.attn_processors.values()] == names

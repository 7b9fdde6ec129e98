"""diffusers' caches, which skip layers, blocks and whole calls: sparse attention runs where the cache lets it."""

from contextlib import contextmanager

import diffusers
import pytest
import torch
import torch.nn.functional as F
from enabled import FULL, config, report_of
from tiny.model import TEXT_TOKENS
from tiny_models import TINY, generate, tiny_wan_pipeline
from tiny_pipelines import text, without_encoders
from torch.nn.attention import SDPBackend, sdpa_kernel

STEPS = 8
FRAMES, HEIGHT, WIDTH = GRID = (2, 3, 5)


def pyramid_attention_broadcast(pipeline):
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 10_000),
        spatial_attention_block_identifiers=("blocks.*attn1",),
        current_timestep_callback=lambda: pipeline.current_timestep,
    )


def mag_cache(pipeline):
    return diffusers.MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS)


def taylor_seer(pipeline):
    return diffusers.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, cache_identifiers=["blocks.*attn1"]
    )


def sea_cache(pipeline):
    return diffusers.SeaCacheConfig(threshold=1e9)


def faster_cache(pipeline):
    return diffusers.FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 10_000),
        unconditional_batch_skip_range=3,
        unconditional_batch_timestep_skip_range=(-1, 10_000),
        attention_weight_callback=lambda module: 0.5,
        tensor_format="BFCHW",
        current_timestep_callback=lambda: pipeline.current_timestep,
    )


def cogvideox():
    """A pipeline whose guidance branches are rows of one call, as FasterCache wants them."""
    return without_encoders(
        diffusers.CogVideoXPipeline,
        transformer=TINY["cogvideox"].make(sample_height=2 * HEIGHT, sample_width=2 * WIDTH),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def generate_cogvideox(pipeline, **changes):
    return pipeline(
        prompt_embeds=text(),
        negative_prompt_embeds=-text(),
        height=16 * HEIGHT,
        width=16 * WIDTH,
        num_frames=4 * (FRAMES - 1) + 1,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **changes,
    ).frames


def generate_wan(pipeline, **changes):
    return generate(pipeline, steps=STEPS, grid=GRID, **changes)


CASES = {
    pyramid_attention_broadcast: (tiny_wan_pipeline, generate_wan),
    mag_cache: (tiny_wan_pipeline, generate_wan),
    taylor_seer: (tiny_wan_pipeline, generate_wan),
    sea_cache: (tiny_wan_pipeline, generate_wan),
    faster_cache: (cogvideox, generate_cogvideox),
}


@contextmanager
def counted_self_attention(monkeypatch):
    """One entry for each call of attention over the whole sequence while the block runs."""
    calls, stock = [], F.scaled_dot_product_attention
    tokens = FRAMES * HEIGHT * WIDTH

    def count(query, key, *args, **kwargs):
        if query.shape[2] == key.shape[2] and query.shape[2] in (tokens, tokens + TEXT_TOKENS):
            calls.append(query.shape[0])
        return stock(query, key, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", count)
        yield calls


@pytest.mark.parametrize("cache", CASES)
def test_sparse_attention_runs_in_the_calls_that_a_cache_leaves(cache, monkeypatch):
    make, run = CASES[cache]

    def cached():
        pipeline = make()
        pipeline.transformer.enable_cache(cache(pipeline))
        return pipeline

    with counted_self_attention(monkeypatch) as all_calls:
        run(make())
    with counted_self_attention(monkeypatch) as calls:
        stock = run(cached())
    assert 0 < sum(calls) < sum(all_calls)
    # Another order of the same sums in float32 is as far off as ours may be.
    with sdpa_kernel(SDPBackend.MATH):
        tolerance = 4 * (run(cached()) - stock).abs().max().item()

    pipeline = cached()
    pipeline.enable_sparse_attention(FULL)
    torch.testing.assert_close(run(pipeline), stock, rtol=0, atol=tolerance)
    assert (report_of(pipeline).sparse_calls, report_of(pipeline).dense_calls) == (len(calls), 0)
    pipeline.disable_sparse_attention()
    assert torch.equal(run(pipeline), stock)


@pytest.mark.parametrize("cache", CASES)
def test_early_steps_are_counted_by_the_step_and_not_by_the_calls(cache, monkeypatch):
    make, run = CASES[cache]
    calls_after_step = []

    def look(pipe, step, timestep, kwargs):
        calls_after_step.append(len(calls))
        return kwargs

    pipeline = make()
    pipeline.transformer.enable_cache(cache(pipeline))
    with counted_self_attention(monkeypatch) as calls:
        run(pipeline, callback_on_step_end=look)
    pipeline.enable_sparse_attention(config(dense_steps=2 / STEPS))
    run(pipeline)
    report = report_of(pipeline)
    assert report.dense_reasons == {"early step": calls_after_step[1]}
    assert report.sparse_calls == len(calls) - calls_after_step[1]

"""cache-dit, which skips blocks that change little: sparse attention runs in those that it leaves."""

import pytest
import torch
from enabled import FULL, config, report_of
from tiny_models import generate, tiny_wan_pipeline
from tiny_pipelines import generate_image, tiny_flux_pipeline

cache_dit = pytest.importorskip("cache_dit")

STEPS, WARMUP = 8, 2


def generate_wan(pipeline):
    return generate(pipeline, steps=STEPS)


def generate_flux(pipeline):
    return generate_image(pipeline, steps=STEPS)


PIPELINES = {"wan": (tiny_wan_pipeline, generate_wan), "flux": (tiny_flux_pipeline, generate_flux)}


def enable_cache(pipeline):
    options = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=WARMUP, residual_diff_threshold=1e9
    )
    cache_dit.enable_cache(pipeline, cache_config=options)


@pytest.mark.parametrize("enabled_first", [False, True])
@pytest.mark.parametrize("name", PIPELINES)
def test_blocks_that_are_left_run_sparse_in_either_order(name, enabled_first):
    make, run = PIPELINES[name]
    original, cached = run(make()), make()
    enable_cache(cached)
    stock = run(cached)
    assert (stock - original).abs().max() > 1e-3

    pipeline = make()
    steps = [enable_cache, lambda pipeline: pipeline.enable_sparse_attention(FULL)]
    for step in reversed(steps) if enabled_first else steps:
        step(pipeline)
    torch.testing.assert_close(run(pipeline), stock)
    report = report_of(pipeline)
    calls_a_step = 2 if name == "wan" else 1
    # All layers in the warm-up, one of them afterwards.
    assert report.sparse_calls == calls_a_step * (WARMUP * report.num_layers + (STEPS - WARMUP))
    assert report.dense_calls == 0

    pipeline.disable_sparse_attention()
    assert torch.equal(run(pipeline), stock)
    pipeline.enable_sparse_attention(config(dense_steps=WARMUP / STEPS))
    run(pipeline)
    report = report_of(pipeline)
    assert report.dense_reasons == {"early step": calls_a_step * WARMUP * report.num_layers}
    assert report.sparse_calls == calls_a_step * (STEPS - WARMUP)
    cache_dit.disable_cache(pipeline)
    pipeline.disable_sparse_attention()
    assert torch.equal(run(pipeline), original)

"""Every baseline changes the latents of a tiny pipeline while it is on, and nothing after."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tiny_models import TINY, generate, tiny_wan_pipeline

from diffsparse.eval.baseline import AttentionBackend, Cache, cache_names

STEPS = 6
OPTIONS = {
    "FirstBlockCacheConfig": {"threshold": 1e9},
    "MagCacheConfig": {"mag_ratios": [1.0, 1.0, 1.0]},
    "PyramidAttentionBroadcastConfig": {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (-1, 10_000),
    },
    "SeaCacheConfig": {"threshold": 1e9},
    "TaylorSeerCacheConfig": {
        "cache_interval": 2,
        "disable_cache_before_step": 1,
        "cache_identifiers": ["blocks.*attn1"],
    },
}


def latents(pipe):
    return generate(pipe, steps=STEPS)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_cache_is_on_inside_the_block_only(name):
    pipe = tiny_wan_pipeline()
    dense = latents(pipe)
    with Cache(name, OPTIONS[name]).on(pipe, STEPS):
        cached = latents(pipe)
    assert not torch.equal(cached, dense)
    assert not pipe.transformer.is_cache_enabled
    assert torch.equal(latents(pipe), dense)


def test_a_cache_that_finds_nothing_is_refused():
    pipe = tiny_wan_pipeline()
    cache = Cache("TaylorSeerCacheConfig", {"cache_identifiers": ["nowhere"]})
    with pytest.raises(ValueError, match=r"nothing to keep in Wan.*cache_identifiers"), cache.on(pipe, STEPS):
        pass
    assert not pipe.transformer.is_cache_enabled


def test_every_cache_of_diffusers_has_a_name():
    taken = {name for name in dir(diffusers) if name.endswith(("CacheConfig", "BroadcastConfig"))}
    # It keeps nothing but the text, for one model.
    assert set(cache_names().values()) == taken - {"TextKVCacheConfig"}


def test_what_a_cache_has_to_be_told_of_the_run_is_filled_in():
    pipe = tiny_wan_pipeline()
    config = Cache("MagCacheConfig", OPTIONS["MagCacheConfig"])._config(pipe, 7)
    assert (config.num_inference_steps, len(config.mag_ratios)) == (7, 7)
    pipe._current_timestep = 5
    assert Cache("PyramidAttentionBroadcastConfig", {})._config(pipe, 7).current_timestep_callback() == 5


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("FirstBlockCacheConfig", {"thresh": 1}, "no option 'thresh'. FirstBlockCacheConfig has threshold"),
        ("FirstBlockCacheConfig", {"threshold": True}, "must be float, got True"),
        ("TaylorSeerCacheConfig", {"max_order": 1.5}, "must be int, got 1.5"),
        ("TaylorSeerCacheConfig", {"cache_identifiers": "blocks"}, r"must be list\[str\] \| None, got 'blocks'"),
        ("PyramidAttentionBroadcastConfig", {"current_timestep_callback": 3}, "no option 'current_timestep_callback'"),
        ("SeaCacheConfig", {"threshold": -1.0}, "non-negative"),
        ("MagCacheConfig", {}, "mag_ratios"),
    ],
)
def test_wrong_options_of_a_cache_are_refused(name, options, says):
    with pytest.raises(ValueError, match=says):
        Cache(name, options)


def test_a_transformer_without_caches_is_refused():
    pipe = tiny_wan_pipeline()
    pipe.transformer = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="no caches for Linear"), Cache("SeaCacheConfig", {}).on(pipe, STEPS):
        pass


def test_a_backend_computes_inside_the_block_only(monkeypatch):
    pipe = tiny_wan_pipeline()
    calls = []
    stock = torch.nn.functional.scaled_dot_product_attention

    def look(*args, **kwargs):
        calls.append(torch.backends.cuda.math_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled())
        return stock(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    dense = latents(pipe)
    assert not any(calls)
    calls.clear()
    with AttentionBackend("_native_math").on(pipe, STEPS):
        other = latents(pipe)
    # Self- and cross-attention of both branches; the text encoder has its own.
    assert sum(calls) == 4 * STEPS * len(pipe.transformer.blocks)
    torch.testing.assert_close(other, dense, rtol=1e-3, atol=1e-4)
    calls.clear()
    assert torch.equal(latents(pipe), dense)
    assert not any(calls)


def test_a_backend_that_is_not_installed_is_refused_with_what_to_install(monkeypatch):
    from diffusers.models import attention_dispatch

    monkeypatch.setattr(attention_dispatch, "_CAN_USE_SAGE_ATTN", False)
    with pytest.raises(ValueError, match=r"install `sageattention.*Here are the packages for .*native"):
        AttentionBackend("sage")
    with pytest.raises(ValueError, match=r"'sagge' is no attention backend of diffusers, which has .*sage"):
        AttentionBackend("sagge")


def test_a_model_whose_attention_no_backend_reaches_is_refused():
    pipe = tiny_wan_pipeline()
    pipe.transformer = TINY["cogvideox"].make()
    with pytest.raises(ValueError, match="takes an attention backend"), AttentionBackend("native").on(pipe, STEPS):
        pass

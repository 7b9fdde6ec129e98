from __future__ import annotations

import time

import pytest
import torch
from tiny_models import generate, tiny_wan_pipeline

from diffsparse.eval import attention_seconds
from diffsparse.eval.attention_seconds import AttentionSeconds

CALLS_OF_3_STEPS = 3 * 2
"""Of a layer, with guidance."""


class Clock:
    """Goes on by one second each time that it is read."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        self.time += 1
        return self.time


@pytest.mark.parametrize("sparse", [False, True])
def test_every_call_of_self_attention_counts_and_nothing_else(sparse, monkeypatch):
    monkeypatch.setattr(attention_seconds.time, "perf_counter", Clock())
    pipe = tiny_wan_pipeline()
    if sparse:
        pipe.enable_sparse_attention()
    with AttentionSeconds(pipe, "cpu") as seconds:
        generate(pipe, steps=3)
    # Between two readings of the clock lies one second.
    assert seconds.total == CALLS_OF_3_STEPS * len(pipe.transformer.blocks)
    generate(pipe, steps=3)
    assert seconds.total == CALLS_OF_3_STEPS * len(pipe.transformer.blocks)


def test_it_is_less_than_the_whole_time_and_more_than_what_the_attention_waits(monkeypatch):
    pipe = tiny_wan_pipeline()
    stock = torch.nn.functional.scaled_dot_product_attention

    def slow(query, key, *args, **kwargs):
        if query.shape == key.shape:
            time.sleep(0.002)
        return stock(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", slow)
    begun = time.perf_counter()
    with AttentionSeconds(pipe, "cpu") as seconds:
        generate(pipe, steps=3)
    least = 0.002 * CALLS_OF_3_STEPS * len(pipe.transformer.blocks)
    assert least < seconds.total < time.perf_counter() - begun


def test_a_transformer_of_no_known_family_has_none():
    pipe = tiny_wan_pipeline()
    pipe.transformer = torch.nn.Linear(1, 1)
    with AttentionSeconds(pipe, "cpu") as seconds:
        pass
    assert seconds.total is None


def test_a_device_without_a_clock_of_ours_has_none():
    with AttentionSeconds(tiny_wan_pipeline(), "mps") as seconds:
        pass
    assert seconds.total is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_events_say_it():
    pipe = tiny_wan_pipeline()
    pipe.transformer.to("cuda")
    torch.cuda.synchronize()
    begun = time.perf_counter()
    with AttentionSeconds(pipe, "cuda") as seconds:
        generate(pipe, steps=3)
    assert 0 < seconds.total < time.perf_counter() - begun

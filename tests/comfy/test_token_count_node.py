from __future__ import annotations

import comfy_standins as standins
import pytest
import torch

from diffsparse.comfy.token_count_node import DiffSparseTokenCount


def test_tokens_are_counted_without_running_the_model():
    model = standins.patcher()
    out = DiffSparseTokenCount().count(model, {"samples": torch.zeros(1, 4, 5, 20, 16)}, density=0.25)
    assert out["result"][1] == 5 * 10 * 8
    with pytest.raises(ValueError, match="UNetModel is no diffusion transformer"):
        DiffSparseTokenCount().count(standins.patcher(standins.UNetModel), {"samples": torch.zeros(1, 4, 8, 8)})


def test_an_empty_latent_counts_in_the_size_that_the_sampler_gives_it():
    # Of 640 x 512 pixels: one latent pixel for 8, where the model has one for 16.
    latent = {"samples": torch.zeros(1, 4, 5, 80, 64), "downscale_ratio_spacial": 8}
    model = standins.patcher()
    assert DiffSparseTokenCount().count(model, latent)["result"][1] == 5 * 20 * 16
    latent["samples"] += 1
    assert DiffSparseTokenCount().count(model, latent)["result"][1] == 5 * 40 * 32

from __future__ import annotations

import comfy_standins as standins
import torch

from diffsparse.comfy.report_node import DiffSparseReport


def test_the_report_tells_what_ran_and_draws_a_cell_for_each_head():
    latent = {"samples": torch.zeros(1)}
    model = standins.patcher()
    report = DiffSparseReport().report
    assert "no DiffSparse Attention node" in report(model, latent)["result"][0]
    sparse = standins.patched(model)
    assert "not been sampled yet" in report(sparse, latent)["result"][0]
    standins.sample(sparse)
    text, image, passed_on = report(sparse, latent)["result"]
    assert "4 of 5 steps sparse" in text
    assert "density of sparse calls" in text
    # Two layers of two heads.
    assert image.shape == (1, 48, 48, 3)
    assert passed_on is latent

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import TINY

import diffsparse  # noqa: F401
from diffsparse.block_mask import BlockMask
from diffsparse.plan import AttentionPlan
from diffsparse.report import SparseAttentionReport, TransformerReport
from diffsparse.session import LayerTally


def part(sparse_calls: int, dense_reasons: dict[str, int], density: float) -> TransformerReport:
    dense_calls = sum(dense_reasons.values())
    return TransformerReport(
        name="transformer",
        family="wan",
        num_layers=1,
        num_heads=2,
        sparse_calls=sparse_calls,
        dense_calls=dense_calls,
        dense_reasons=dense_reasons,
        density=density,
        overall_density=(sparse_calls * density + dense_calls) / (sparse_calls + dense_calls),
        head_classes=[["spatial", "textural"]],
        head_densities=[[0.2, 0.3]],
        precisions={"int8": sparse_calls},
    )


def test_two_transformers_weigh_by_their_calls():
    report = SparseAttentionReport((part(30, {"early step": 10}, 0.2), part(10, {}, 0.4)))
    assert report.density == pytest.approx((30 * 0.2 + 10 * 0.4) / 40)
    assert report.overall_density == pytest.approx((30 * 0.2 + 10 + 10 * 0.4) / 50)


def test_calls_on_two_devices_are_counted_together():
    tally = LayerTally()
    for device in ("cpu", "meta"):
        counts = torch.full((1, 2, 3), 2, dtype=torch.int32, device=device)
        mask = BlockMask(torch.zeros((1, 2, 3, 1), dtype=torch.uint8, device=device), counts, 48, 16, 16)
        tally.count_sparse(AttentionPlan(None, mask))
    assert tally.sparse_calls == 2
    assert tally.density.shape == (2,)


def test_nothing_has_run_yet():
    transformer = TINY["wan"].make()
    transformer.enable_sparse_attention()
    report = transformer.sparse_attention_report()
    assert report.density is None
    assert report.overall_density is None
    assert "none yet" in str(report)


def test_the_table_names_every_reason_and_class():
    table = str(SparseAttentionReport((part(3, {"early step": 2, "attention mask": 1}, 0.25),)))
    for text in (
        "wan",
        "3 sparse, 3 dense",
        "sparse in int8",
        "early step",
        "attention mask",
        "25.0 %",
        "50.0 % spatial",
    ):
        assert text in table


def test_the_dict_is_ready_for_json():
    report = SparseAttentionReport((part(3, {"early step": 2}, 0.25),))
    found = json.loads(json.dumps(report.as_dict()))
    assert found["density"] == 0.25
    assert found["transformers"][0]["class_shares"] == {"spatial": 0.5, "textural": 0.5}

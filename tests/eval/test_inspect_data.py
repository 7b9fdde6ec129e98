from __future__ import annotations

import json

import pytest

from diffsparse.eval.inspect_data import collect
from diffsparse.eval.inspect_measures import HeadMeasure
from diffsparse.eval.inspect_watch import Place, Watch
from diffsparse.report import SparseAttentionReport, TransformerReport


def head(name="spatial", recall=0.8, error=0.1, tail=False, incoherence=(8.0, 7.0)):
    return HeadMeasure(name, 0.25, recall, error, tail, False, *incoherence)


def report(name, layers=1, heads=2, sparse=0, reasons=None):
    reasons = reasons or {}
    classes, densities = [["dense"] * heads] * layers, [[1.0] * heads] * layers
    calls = sum(reasons.values())
    return TransformerReport(name, "wan", layers, heads, sparse, calls, reasons, 0.25, 0.5, classes, densities)


@pytest.fixture
def seen():
    """Two experts, three steps: the first is dense, the second has one layer, sparse in the last two steps."""
    watch = Watch((2,), None)
    watch.report = SparseAttentionReport(
        (report("transformer", reasons={"early step": 1}), report("transformer_2", sparse=2), report("other", heads=0))
    )
    watch.dense_reasons = {Place("transformer", 0, 0): "early step"}
    watch.measures = {
        Place("transformer_2", 1, 0): (head(recall=0.5, error=0.3, incoherence=(6.0, 4.0)), head("temporal", 0.9, 0.2)),
        Place("transformer_2", 2, 0): (head("textural", 0.7, 0.5, tail=True), head("temporal", 0.9, 0.1)),
    }
    return collect(watch, 3)


def test_means_are_over_the_sparse_steps(seen):
    assert seen["summary"]["recall"] == pytest.approx((0.5 + 0.9 + 0.7 + 0.9) / 4)
    assert seen["summary"]["error"] == pytest.approx((0.3 + 0.2 + 0.5 + 0.1) / 4)
    # 0.5, 0.7, 0.9, 0.9: a twentieth of the way through the three gaps.
    assert seen["summary"]["recall_5th_percentile"] == pytest.approx(0.5 + 0.15 * 0.2)
    assert seen["summary"]["worst_head"] == {"transformer": "transformer_2", "layer": 0, "head": 0, "error": 0.4}
    assert (seen["summary"]["incoherence_own_order"], seen["summary"]["incoherence_plan_order"]) == (7.5, 6.25)
    first, second = seen["transformers"][1]["heads"]
    assert (first["incoherence_own_order"], first["incoherence_plan_order"]) == (7, 5.5)
    assert (first["recall"], first["error"]) == (pytest.approx(0.6), pytest.approx(0.4))
    assert first["classes"] == {"spatial": 1, "textural": 1}
    assert (first["largest_error"], first["largest_error_at_step"], first["tail_steps"]) == (0.5, 2, 1)
    assert (second["class"], second["sparse_steps"]) == ("temporal", 2)


def test_what_was_dense_is_exact_and_has_its_reason(seen):
    dense, sparse, never = seen["transformers"]
    assert [step["layers"][0]["dense"] for step in dense["steps"]] == ["early step"] + [
        "its attention was not called"
    ] * 2
    assert [step["layers"][0]["dense"] for step in sparse["steps"]] == ["its attention was not called", None, None]
    of_first = dense["heads"][0]
    assert (of_first["class"], of_first["density"], of_first["recall"], of_first["error"]) == ("dense", 1, 1, 0)
    assert of_first["largest_error_at_step"] is None
    assert of_first["incoherence_own_order"] is of_first["incoherence_plan_order"] is None
    assert never["heads"] == []


def test_it_is_json(seen):
    assert json.loads(json.dumps(seen, allow_nan=False)) == seen

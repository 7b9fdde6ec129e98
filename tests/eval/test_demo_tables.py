from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from diffsparse import SparseAttentionReport, TransformerReport
from diffsparse.eval.comparison import compare
from diffsparse.eval.demo_tables import attention_table, quality_table, time_table
from diffsparse.eval.generate import Generation
from diffsparse.eval.lpips_metric import NoLpips


def lines(table, width=200):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue().splitlines()


def row(table, label):
    (line,) = [line for line in lines(table) if label in line]
    return [cell.strip() for cell in line.strip("│").split("│")]


def transformer(name="transformer", **changes):
    values = {
        "name": name,
        "family": "wan",
        "num_layers": 2,
        "num_heads": 2,
        "sparse_calls": 30,
        "dense_calls": 10,
        "dense_reasons": {"early step": 10},
        "density": 0.25,
        "overall_density": 0.4375,
        "head_classes": [["spatial", "temporal"], ["temporal", "temporal"]],
        "head_densities": [[0.25, 0.25], [0.25, 0.25]],
    }
    return TransformerReport(**(values | changes))


def made(steps, total):
    return Generation(np.zeros((1, 16, 16, 3), dtype=np.float32), steps, total)


def test_times_stand_beside_their_ratio():
    table = time_table(made((2.0, 4.0), 8.0), made((1.0, 1.0), 4.0))
    assert row(table, "per denoising step") == ["per denoising step", "3.00", "1.00", "3.00×"]
    assert row(table, "text encoder") == ["text encoder and VAE", "2.00", "2.00", "1.00×"]
    assert row(table, "in all") == ["in all", "8.00", "4.00", "2.00×"]


def test_quality_shows_mean_and_worst():
    a = np.zeros((2, 16, 16, 3), dtype=np.float32)
    b = a + np.array([0.1, 0.01], dtype=np.float32).reshape(2, 1, 1, 1)
    table = quality_table(compare([(a, b)], NoLpips("alex", "n/a: get it")))
    assert row(table, "PSNR")[1:] == ["30.00", "20.00 (frame 0)"]
    assert row(table, "LPIPS, alex")[1:] == ["n/a", "see below"]


def test_every_dense_reason_and_head_class_has_its_row():
    table = attention_table(SparseAttentionReport((transformer(),)))
    assert row(table, "density of the sparse calls")[1:] == ["25.0 %"]
    assert row(table, "density of all calls")[1:] == ["43.8 %"]
    assert row(table, "temporal")[1:] == ["75.0 %"]
    assert row(table, "spatial")[1:] == ["25.0 %"]
    assert row(table, "dense: early step")[1:] == ["10"]


def test_each_transformer_has_its_column():
    never = transformer(
        "transformer_2",
        sparse_calls=0,
        density=None,
        dense_reasons={"too few tokens": 10},
        head_classes=[["dense", "dense"]],
    )
    table = attention_table(SparseAttentionReport((transformer(), never)))
    assert row(table, "density of the sparse calls")[1:] == ["25.0 %", "none ran"]
    assert row(table, "early step")[1:] == ["10", "0"]
    assert row(table, "too few tokens")[1:] == ["0", "10"]
    assert row(table, "heads that are dense")[1:] == ["0.0 %", "100.0 %"]


@pytest.mark.parametrize("width", [60, 80])
def test_tables_fit_a_narrow_terminal(width):
    times = time_table(made((1.0,), 2.0), made((1.0,), 2.0))
    attention = attention_table(SparseAttentionReport((transformer(),)))
    assert max(len(line) for table in (times, attention) for line in lines(table, width)) <= width

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest
import torch

from diffsparse.eval import bench, bench_suite, bench_transformer
from diffsparse.eval.bench_suite import Geometry
from diffsparse.eval.bench_transformer import Subject
from diffsparse.grid import TokenGrid
from diffsparse.kernels import block_sparse_eager

SMALL = Geometry("small", TokenGrid(2, 8, 9), 2, 16)
OTHER = dataclasses.replace(SMALL, name="other")
TRANSFORMER = Subject(
    "WanTransformer3DModel",
    {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "text_dim": 8},
    {"num_layers": 5},
    {"hidden_states": (1, 16, 3, 16, 16), "encoder_hidden_states": (1, 4, 8)},
    {"timestep": 500},
)


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.setitem(bench_suite.SUITES, "tiny", (SMALL, OTHER))
    monkeypatch.setattr(bench_suite, "DENSITIES", (1.0, 0.5))


def run(output, *arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(["--suite", "tiny", "--output", str(output), "--repeats", "1", *arguments]))


def test_every_precision_and_density_is_compared_with_dense(suite, tmp_path, capsys):
    output = tmp_path / "speed.json"
    assert run(output) == 0
    result = json.loads(output.read_text())["attention"]["small"]
    assert result["tokens"] == 144
    ours = {name: call for name, call in result["calls"].items() if "error" in call}
    assert list(ours) == [f"{precision} {density:g}" for precision in bench_suite.PRECISIONS for density in (1, 0.5)]
    dense = result["calls"][result["best_dense"]]["seconds"]
    assert dense == min(call["seconds"] for name, call in result["calls"].items() if name not in ours)
    for call in result["calls"].values():
        assert call["speed_up"] == pytest.approx(dense / call["seconds"])
        operations = 4 * 144**2 * 16 * 2 * call["density"]
        assert call["tflops"] * 1e12 * call["seconds"] == pytest.approx(operations)
    assert ours["native 1"]["error"] < 1e-6 < ours["int8 1"]["error"]

    assert bench.run(argparse.Namespace(table=output)) == 0
    assert "| ours, int8_fp8 | 100% |" in capsys.readouterr().out


def test_what_is_measured_is_not_measured_again(suite, tmp_path, monkeypatch):
    output = tmp_path / "speed.json"
    monkeypatch.setattr(bench_suite, "SUITES", {"tiny": (SMALL,)})
    run(output)
    first = json.loads(output.read_text())
    monkeypatch.setattr(bench_suite, "SUITES", {"tiny": (SMALL, OTHER)})
    run(output)
    second = json.loads(output.read_text())
    assert second["attention"]["small"] == first["attention"]["small"]
    assert list(second["attention"]) == ["small", "other"]
    output.write_text(json.dumps(second | {"machine": {"device": "another"}}))
    with pytest.raises(ValueError, match="another"):
        run(output)


def test_a_wrong_kernel_is_not_timed(suite, tmp_path, monkeypatch):
    right = block_sparse_eager.attend

    def wrong(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        return out * 1.1, lse

    monkeypatch.setattr(block_sparse_eager, "attend", wrong)
    with pytest.raises(ValueError, match="off by 1"):
        run(tmp_path / "speed.json")
    assert not (tmp_path / "speed.json").exists()


def test_a_transformer_takes_turns_with_itself(monkeypatch):
    from diffsparse import Adaptive, SparseAttentionConfig

    config = SparseAttentionConfig(Adaptive(query_block_size=16, key_block_size=16), min_tokens=0)
    result = bench_transformer.bench_transformer(TRANSFORMER, torch.device("cpu"), config, 1, num_layers=2)
    assert (result["layers_measured"], result["layers_of_model"]) == (2, 5)
    seconds = result["seconds_per_step"]
    assert result["speed_up"] == pytest.approx(seconds["dense"] / seconds["sparse"])
    assert 0.2 < result["density"] < 0.4

from __future__ import annotations

import pytest

from diffsparse import PRESETS, Adaptive, Dense, SparseAttentionConfig
from diffsparse.config import as_config
from diffsparse.kernels.backends import BACKENDS


def test_none_is_the_balanced_preset():
    assert as_config(None) == as_config("balanced") == PRESETS["balanced"]()


def test_a_config_is_taken_as_it_is():
    config = SparseAttentionConfig(Dense(), dense_steps=0.5)
    assert as_config(config) is config


def test_presets_go_from_quality_to_fast():
    quality, balanced, fast = (PRESETS[name]() for name in ("quality", "balanced", "fast"))
    assert quality.strategy.density > balanced.strategy.density > fast.strategy.density
    assert quality.dense_steps >= balanced.dense_steps >= fast.dense_steps


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"dense_steps": 10}, ValueError, "`dense_steps` must be a fraction between 0 and 1, got 10"),
        ({"dense_steps": -0.1}, ValueError, "`dense_steps`"),
        ({"dense_steps": "0.2"}, ValueError, "`dense_steps`"),
        ({"dense_steps": True}, ValueError, "`dense_steps`"),
        ({"dense_layers": 0}, TypeError, "`dense_layers` must be a tuple"),
        ({"dense_layers": (0.5,)}, TypeError, "`dense_layers`"),
        ({"min_tokens": -1}, ValueError, "`min_tokens`"),
        ({"min_tokens": 1.5}, ValueError, "`min_tokens`"),
        ({"replan_every": 0}, ValueError, "`replan_every`"),
        ({"strict": "yes"}, TypeError, "`strict`"),
        ({"backend": "tritn"}, ValueError, f"`backend` must be None or one of {', '.join(BACKENDS)}, got 'tritn'"),
        (
            {"quantization": "fp4"},
            ValueError,
            "`quantization` must be None or one of int8, int8_int8, int8_fp8, fp8, int4, got 'fp4'",
        ),
        ({"quantization": True}, ValueError, "`quantization`"),
        ({"dense_quantization": "fp4"}, ValueError, "`dense_quantization` must be None or one of int8, .*, got 'fp4'"),
        ({"dense_quantization": "native"}, ValueError, "`dense_quantization`"),
        ({"backend": ["triton"]}, ValueError, r"`backend` must be None or one of .*, got \['triton'\]"),
        ({"strategy": "adaptive"}, TypeError, "`strategy` must be a strategy object"),
        ({"strategy": Adaptive}, TypeError, "`strategy`"),
    ],
)
def test_refuses_wrong_options_when_made(wrong, error, message):
    with pytest.raises(error, match=message):
        SparseAttentionConfig(**wrong)


def test_refuses_unknown_presets_and_bare_strategies():
    with pytest.raises(ValueError, match=r"'fastest'.*'quality', 'balanced', 'fast'"):
        as_config("fastest")
    with pytest.raises(ValueError, match="names no preset: got ''"):
        as_config("")
    with pytest.raises(TypeError, match=r"got Adaptive\(…\)\. A strategy goes into a config: .*\(Adaptive\(…\)\)\.$"):
        as_config(Adaptive())
    with pytest.raises(TypeError, match=r"got 3\.$"):
        as_config(3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"density": 0},
        {"density": 1.5},
        {"density": "a"},
        {"key_block_size": 0},
        {"query_block_size": 1.5},
        {"sampled_rows": 0},
        {"tile": (4, 4)},
        {"tile": [4, 4, 4]},
        {"tile": 4},
        {"density": True},
        {"tail": "no"},
        {"seed": "x"},
        {"candidates": []},
        {"band_margin": "a"},
        {"tile": (4, 4, 0)},
        {"band_margin": 0.5},
        {"band_margin": float("nan")},
        {"band_margin": float("inf")},
        {"band_margin": True},
        {"tile": (True, 8, 8)},
    ],
)
def test_adaptive_refuses_wrong_options_when_made(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
        Adaptive(**wrong)

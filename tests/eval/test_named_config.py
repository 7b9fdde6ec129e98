from __future__ import annotations

import pytest

from diffsparse import PRESETS, Adaptive, Dense, SparseAttentionConfig
from diffsparse.eval.named_config import exported_strategies, read_config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_named_as_elsewhere(name):
    assert read_config(name) == PRESETS[name]()


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("adaptive", SparseAttentionConfig(Adaptive())),
        ("Adaptive:density=0.2,dense_steps=0", SparseAttentionConfig(Adaptive(density=0.2), dense_steps=0)),
        ("adaptive:tile=(1,2,2),tail=False", SparseAttentionConfig(Adaptive(tile=(1, 2, 2), tail=False))),
        ("dense:backend=eager,dense_layers=(0,-1)", SparseAttentionConfig(Dense(), 0.2, (0, -1), backend="eager")),
        ("fast:strict=True", SparseAttentionConfig(Adaptive(density=0.15), dense_steps=0.1, strict=True)),
    ],
)
def test_options_go_to_the_strategy_or_to_the_config(text, config):
    assert read_config(text) == config


def test_every_strategy_that_diffsparse_exports_has_its_name():
    assert exported_strategies().items() >= {"adaptive": Adaptive, "dense": Dense}.items()
    for name in exported_strategies():
        assert name == type(read_config(name).strategy).__name__.lower()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fats", "'fats' is neither a preset .*fast.* nor a strategy .*adaptive"),
        ("adaptive:densty=0.2", "no option 'densty'.*density.*dense_steps"),
        ("adaptive:density=2", "`density` must be"),
        ("fast:dense_steps=20", "`dense_steps` must be"),
        ("adaptive:density", "OPTION=VALUE"),
        ("adaptive:density=0.2)+(1", "OPTION=VALUE"),
        ("adaptive:density=0.2)(tail=False", "OPTION=VALUE"),
        ("adaptive:density=0.2)(", "OPTION=VALUE"),
        ("adaptive:density=__import__('os').getpid()", "OPTION=VALUE"),
        ("adaptive:**{}", "OPTION=VALUE"),
        ("fast:strategy=dense", "no option 'strategy'"),
        ("", "neither"),
        (r"C:\plans\mine.safetensors:dense_steps=0.1", r"no plan file C:\\plans\\mine\.safetensors\."),
        ("d:/plans/mine.safetensors", r"no plan file d:/plans/mine\.safetensors\."),
    ],
)
def test_what_is_wrong_is_said(text, says):
    with pytest.raises(ValueError, match=says):
        read_config(text)

"""Sparse attention for diffusion transformers.

Importing diffsparse gives the pipelines and models of diffusers these methods:
`enable_sparse_attention(config=None)`, `disable_sparse_attention()`, `is_sparse_attention_enabled` and
`sparse_attention_report()`. The same are here as functions of a pipeline or a transformer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffsparse.methods import add_methods

if TYPE_CHECKING:
    from diffsparse.config import PRESETS, SparseAttentionConfig
    from diffsparse.enable import (
        disable_sparse_attention,
        enable_sparse_attention,
        is_sparse_attention_enabled,
        sparse_attention_report,
    )
    from diffsparse.report import SparseAttentionReport, TransformerReport
    from diffsparse.session import DenseFallback
    from diffsparse.strategies.adaptive import Adaptive
    from diffsparse.strategies.dense import Dense

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Adaptive",
    "Dense",
    "DenseFallback",
    "SparseAttentionConfig",
    "SparseAttentionReport",
    "TransformerReport",
    "disable_sparse_attention",
    "enable_sparse_attention",
    "is_sparse_attention_enabled",
    "sparse_attention_report",
]

_HOMES = {
    "config": ("PRESETS", "SparseAttentionConfig"),
    "enable": (
        "disable_sparse_attention",
        "enable_sparse_attention",
        "is_sparse_attention_enabled",
        "sparse_attention_report",
    ),
    "report": ("SparseAttentionReport", "TransformerReport"),
    "session": ("DenseFallback",),
    "strategies.adaptive": ("Adaptive",),
    "strategies.dense": ("Dense",),
}
"""The module of each public name; it is loaded when the name is first used, so that commands answer at once."""


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


add_methods()

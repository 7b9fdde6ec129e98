"""Sparse attention for diffusion transformers.

Importing diffsparse gives the pipelines and models of diffusers these methods:
`enable_sparse_attention(config=None)`, `disable_sparse_attention()`, `is_sparse_attention_enabled` and
`sparse_attention_report()`. The same are here as functions of a pipeline or a transformer.
"""

from __future__ import annotations

import importlib.util

from diffsparse.config import PRESETS, SparseAttentionConfig
from diffsparse.enable import (
    add_methods,
    disable_sparse_attention,
    enable_sparse_attention,
    is_sparse_attention_enabled,
    sparse_attention_report,
)
from diffsparse.report import SparseAttentionReport, TransformerReport
from diffsparse.session import DenseFallback
from diffsparse.strategies.adaptive import Adaptive
from diffsparse.strategies.dense import Dense
from diffsparse.strategies.paro_attention import PAROAttention
from diffsparse.strategies.rain_fusion import RainFusion
from diffsparse.strategies.sparse_vdit import SparseVDiT
from diffsparse.strategies.sparse_video_gen import SparseVideoGen
from diffsparse.strategies.vmoba import VMoBA

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Adaptive",
    "Dense",
    "DenseFallback",
    "PAROAttention",
    "RainFusion",
    "SparseAttentionConfig",
    "SparseAttentionReport",
    "SparseVDiT",
    "SparseVideoGen",
    "TransformerReport",
    "VMoBA",
    "disable_sparse_attention",
    "enable_sparse_attention",
    "is_sparse_attention_enabled",
    "sparse_attention_report",
]

# ComfyUI has no diffusers, and needs none.
if importlib.util.find_spec("diffusers") is not None:
    add_methods()

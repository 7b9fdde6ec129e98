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
from diffsparse.strategies.draft_attention import DraftAttention
from diffsparse.strategies.flex_prefill import FlexPrefill
from diffsparse.strategies.minference import MInference
from diffsparse.strategies.mm_inference import MMInference
from diffsparse.strategies.paro_attention import PAROAttention
from diffsparse.strategies.radial import Radial
from diffsparse.strategies.rain_fusion import RainFusion
from diffsparse.strategies.rain_fusion2 import RainFusion2
from diffsparse.strategies.s2_attention import S2Attention
from diffsparse.strategies.sample_attention import SampleAttention
from diffsparse.strategies.sliding_tile import SlidingTile
from diffsparse.strategies.sparge_attention import SpargeAttention
from diffsparse.strategies.sparse_d import SparseD
from diffsparse.strategies.sparse_video_gen import SparseVideoGen
from diffsparse.strategies.svg2 import SVG2
from diffsparse.strategies.vmoba import VMoBA
from diffsparse.strategies.x_attention import XAttention

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "SVG2",
    "Adaptive",
    "Dense",
    "DenseFallback",
    "DraftAttention",
    "FlexPrefill",
    "MInference",
    "MMInference",
    "PAROAttention",
    "Radial",
    "RainFusion",
    "RainFusion2",
    "S2Attention",
    "SampleAttention",
    "SlidingTile",
    "SpargeAttention",
    "SparseAttentionConfig",
    "SparseAttentionReport",
    "SparseD",
    "SparseVideoGen",
    "TransformerReport",
    "VMoBA",
    "XAttention",
    "disable_sparse_attention",
    "enable_sparse_attention",
    "is_sparse_attention_enabled",
    "sparse_attention_report",
]

# ComfyUI has no diffusers, and needs none.
if importlib.util.find_spec("diffusers") is not None:
    add_methods()

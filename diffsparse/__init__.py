"""Sparse attention for diffusion transformers.

Importing diffsparse gives the pipelines and models of diffusers these methods:
`enable_sparse_attention(config=None)`, `disable_sparse_attention()`, `is_sparse_attention_enabled` and
`sparse_attention_report()`. The same are here as functions of a pipeline or a transformer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffsparse.methods import add_methods

__version__ = "0.1.0"

# For type checkers: the same names as in _HOMES.
if TYPE_CHECKING:
    from diffsparse.config import PRESETS as PRESETS
    from diffsparse.config import SparseAttentionConfig as SparseAttentionConfig
    from diffsparse.enable import disable_sparse_attention as disable_sparse_attention
    from diffsparse.enable import enable_sparse_attention as enable_sparse_attention
    from diffsparse.enable import is_sparse_attention_enabled as is_sparse_attention_enabled
    from diffsparse.enable import sparse_attention_report as sparse_attention_report
    from diffsparse.pipelines.family import Family as Family
    from diffsparse.pipelines.family import Layout as Layout
    from diffsparse.predict import SparseAttentionPrediction as SparseAttentionPrediction
    from diffsparse.predict import predict_sparse_attention as predict_sparse_attention
    from diffsparse.report import SparseAttentionReport as SparseAttentionReport
    from diffsparse.report import TransformerReport as TransformerReport
    from diffsparse.session import DenseFallback as DenseFallback
    from diffsparse.strategies.ada_cluster import AdaCluster as AdaCluster
    from diffsparse.strategies.ada_spa import AdaSpa as AdaSpa
    from diffsparse.strategies.adaptive import Adaptive as Adaptive
    from diffsparse.strategies.calibrated import Calibrated as Calibrated
    from diffsparse.strategies.dense import Dense as Dense
    from diffsparse.strategies.draft_attention import DraftAttention as DraftAttention
    from diffsparse.strategies.flex_prefill import FlexPrefill as FlexPrefill
    from diffsparse.strategies.jenga import Jenga as Jenga
    from diffsparse.strategies.minference import MInference as MInference
    from diffsparse.strategies.mm_inference import MMInference as MMInference
    from diffsparse.strategies.nabla import NABLA as NABLA
    from diffsparse.strategies.paro_attention import PAROAttention as PAROAttention
    from diffsparse.strategies.radial import Radial as Radial
    from diffsparse.strategies.rain_fusion import RainFusion as RainFusion
    from diffsparse.strategies.rain_fusion2 import RainFusion2 as RainFusion2
    from diffsparse.strategies.s2_attention import S2Attention as S2Attention
    from diffsparse.strategies.sample_attention import SampleAttention as SampleAttention
    from diffsparse.strategies.sliding_tile import SlidingTile as SlidingTile
    from diffsparse.strategies.sol_attention import SolAttention as SolAttention
    from diffsparse.strategies.sparge_attention import SpargeAttention as SpargeAttention
    from diffsparse.strategies.sparse_d import SparseD as SparseD
    from diffsparse.strategies.sparse_vdit import SparseVDiT as SparseVDiT
    from diffsparse.strategies.sparse_video_gen import SparseVideoGen as SparseVideoGen
    from diffsparse.strategies.svg2 import SVG2 as SVG2
    from diffsparse.strategies.svg_ear import SVGEAR as SVGEAR
    from diffsparse.strategies.svoo import SVOO as SVOO
    from diffsparse.strategies.vmoba import VMoBA as VMoBA
    from diffsparse.strategies.x_attention import XAttention as XAttention

_HOMES = {
    "PRESETS": "config",
    "SparseAttentionConfig": "config",
    "disable_sparse_attention": "enable",
    "enable_sparse_attention": "enable",
    "is_sparse_attention_enabled": "enable",
    "sparse_attention_report": "enable",
    "Family": "pipelines.family",
    "Layout": "pipelines.family",
    "SparseAttentionPrediction": "predict",
    "predict_sparse_attention": "predict",
    "SparseAttentionReport": "report",
    "TransformerReport": "report",
    "DenseFallback": "session",
    "AdaCluster": "strategies.ada_cluster",
    "AdaSpa": "strategies.ada_spa",
    "Adaptive": "strategies.adaptive",
    "Calibrated": "strategies.calibrated",
    "Dense": "strategies.dense",
    "DraftAttention": "strategies.draft_attention",
    "FlexPrefill": "strategies.flex_prefill",
    "Jenga": "strategies.jenga",
    "MInference": "strategies.minference",
    "MMInference": "strategies.mm_inference",
    "NABLA": "strategies.nabla",
    "PAROAttention": "strategies.paro_attention",
    "Radial": "strategies.radial",
    "RainFusion": "strategies.rain_fusion",
    "RainFusion2": "strategies.rain_fusion2",
    "S2Attention": "strategies.s2_attention",
    "SampleAttention": "strategies.sample_attention",
    "SlidingTile": "strategies.sliding_tile",
    "SolAttention": "strategies.sol_attention",
    "SpargeAttention": "strategies.sparge_attention",
    "SparseD": "strategies.sparse_d",
    "SparseVDiT": "strategies.sparse_vdit",
    "SparseVideoGen": "strategies.sparse_video_gen",
    "SVG2": "strategies.svg2",
    "SVGEAR": "strategies.svg_ear",
    "SVOO": "strategies.svoo",
    "VMoBA": "strategies.vmoba",
    "XAttention": "strategies.x_attention",
}
"""The module of each public name; it is loaded when the name is first used, so that commands answer at once."""

__all__ = tuple(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


add_methods()

"""Chroma: laid out as FLUX.1, but for its mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines import flux
from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The text tokens, then the image; dense with the mask over pairs of tokens that its pipeline passes.

    The model adds the product of `attention_mask` with itself to the scores, which no list of keys stands for.
    """
    return flux.layout(transformer, call)


CHROMA = Family(
    name="chroma",
    transformers=("ChromaTransformer2DModel",),
    layers=flux.FLUX.layers,
    layout=layout,
)

"""Bria Fibo: laid out as FLUX.1, but for its mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines import flux
from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """Text, image, images to edit; dense with its pipeline's mask, where prompt and negative prompt differ in length.

    The mask hides padded text before the image, so it cannot become a key length.
    """
    return flux.layout(transformer, call)


BRIA_FIBO = Family(
    name="bria_fibo",
    transformers=("BriaFiboTransformer2DModel",),
    layers=flux.FLUX.layers,
    layout=layout,
    text_apart=flux.FLUX.text_apart,
)

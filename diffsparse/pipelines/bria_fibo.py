"""Bria Fibo: laid out as FLUX.1, but for its mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines import flux
from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The text tokens, the image, then images to edit. Where prompts differ in length a mask hides padded text."""
    return flux.layout(transformer, call)


BRIA_FIBO = Family(
    name="bria_fibo",
    transformers=("BriaFiboTransformer2DModel",),
    layers=flux.FLUX.layers,
    layout=layout,
    padding_mask=True,
    text_mask="joint_attention_kwargs.attention_mask",
    text_apart=flux.FLUX.text_apart,
)

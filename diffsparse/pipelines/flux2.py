"""FLUX.2 and FLUX.2 Klein: laid out as FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines import flux
from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The text tokens, the grid of the position ids, references as large as further frames, then others.

    With a cache of the references' keys (Klein KV) attention has other processors and another order.
    """
    return None if call.get("kv_cache_mode") is not None else flux.layout(transformer, call)


FLUX2 = Family(
    name="flux2",
    transformers=("Flux2Transformer2DModel",),
    layers=flux.FLUX.layers,
    layout=layout,
    text_apart=True,
)

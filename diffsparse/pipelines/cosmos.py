"""Cosmos 1, 2 and 2.5: video tokens only, the prompt enters by cross-attention."""

from __future__ import annotations

from diffsparse.pipelines.family import Family
from diffsparse.pipelines.wan import layout

# Condition and padding masks are channels; the tokens lie as Wan's do.
COSMOS = Family(
    name="cosmos",
    transformers=("CosmosTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    layout=layout,
)

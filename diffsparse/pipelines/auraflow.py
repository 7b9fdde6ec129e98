"""AuraFlow: register tokens and text, then the image as one frame; joint blocks, then single-stream ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsparse.pipelines.family import Family, Layout


def layout(transformer: Any, call: Mapping[str, Any]) -> Layout | None:
    """The register tokens, the text tokens, then the grid of the latents [B, C, height, width], cut into patches."""
    latents, text = call.get("hidden_states"), call.get("encoder_hidden_states")
    if latents is None or latents.ndim != 4 or text is None:
        return None
    height, width = latents.shape[2:]
    patch = transformer.config.patch_size
    registers = transformer.register_tokens.shape[1]
    return Layout(1, height // patch, width // patch, text_before=registers + text.shape[1])


AURAFLOW = Family(
    name="auraflow",
    transformers=("AuraFlowTransformer2DModel",),
    layers=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
)

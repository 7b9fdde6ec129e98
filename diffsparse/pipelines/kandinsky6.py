"""Kandinsky 6: video tokens only; text enters by cross-attention, audio runs beside them and stays dense."""

from __future__ import annotations

from diffsparse.pipelines.family import Family
from diffsparse.pipelines.kandinsky5 import layout

# The tokens lie as Kandinsky 5's do. A reference frame is one more frame of the latents, the last.
KANDINSKY6 = Family(
    name="kandinsky6",
    transformers=("Kandinsky6Transformer3DModel",),
    layers=("visual_transformer_blocks.*.video_dec_block.self_attention",),
    layout=layout,
)

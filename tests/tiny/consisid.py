"""A tiny ConsisID: CogVideoX with faces, which enter by attention of their own."""

from typing import Any

from diffusers import ConsisIDTransformer3DModel
from tiny import cogvideox
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, TinyModel, seeded
from torch import nn


def make(**changes: Any) -> nn.Module:
    return seeded(
        ConsisIDTransformer3DModel,
        {
            "num_attention_heads": HEADS,
            "attention_head_dim": HEAD_DIM,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "time_embed_dim": 8,
            "text_embed_dim": TEXT_CHANNELS,
            "num_layers": 3,
            "sample_width": 10,
            "sample_height": 14,
            "sample_frames": 9,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": TEXT_TOKENS,
        },
        changes,
    )


CONSISID = TinyModel(
    make,
    cogvideox.call,
    layers=tuple(f"transformer_blocks.{i}.attn1" for i in range(3)),
    text_before=TEXT_TOKENS,
    prompt=range(TEXT_TOKENS),
    latent_axes="bfchw",
)

"""A tiny AuraFlow."""

from typing import Any

import torch
from diffusers import AuraFlowTransformer2DModel
from tiny.model import CHANNELS, HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, Grid, Random, TinyModel, seeded
from torch import nn


def make(**changes: Any) -> nn.Module:
    model = seeded(
        AuraFlowTransformer2DModel,
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 2,
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": HEADS,
            "joint_attention_dim": TEXT_CHANNELS,
            "caption_projection_dim": HEADS * HEAD_DIM,
            "pos_embed_max_size": 256,
        },
    )(**changes)
    # What attention adds is small beside the rest of the model otherwise.
    for block in (*model.joint_transformer_blocks, *model.single_transformer_blocks):
        block.attn.to_v.weight.mul_(8)
        block.attn.to_out[0].weight.mul_(8)
    return model


def call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = Random(seed)
    _, height, width = grid
    return {
        "hidden_states": random(batch, CHANNELS, 2 * height, 2 * width),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 0.5),
    }


AURAFLOW = TinyModel(
    make,
    call,
    layers=("joint_transformer_blocks.0.attn", *(f"single_transformer_blocks.{i}.attn" for i in range(2))),
    grid=(1, 7, 5),
    text_before=8 + TEXT_TOKENS,
    prompt=range(8, 8 + TEXT_TOKENS),
    latent_axes="bchw",
)

"""Tiny transformers of every family with random weights, calls of them, and a whole tiny pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKLWan,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

HEADS, HEAD_DIM = 2, 32
CHANNELS = 4
TEXT_TOKENS, TEXT_CHANNELS = 7, 16

Grid = tuple[int, int, int]
"""Frames, height, width in tokens."""


class TinyModel(NamedTuple):
    """How to make a transformer of a family, and the named arguments of a call of it.

    Attributes:
        make: config entries that differ from the tiny ones -> the transformer, the same weights each time.
        call: transformer, grid, batch size, seed -> named arguments of its forward.
        layers: names of its self-attention modules, in the order they run.
        text_before, text_after: text tokens in the sequence of self-attention.
    """

    make: Callable[..., nn.Module]
    call: Callable[..., dict[str, Any]]
    layers: tuple[str, ...]
    text_before: int = 0
    text_after: int = 0


def wan(**changes: Any) -> nn.Module:
    return _seeded(
        WanTransformer3DModel,
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": HEADS,
            "attention_head_dim": HEAD_DIM,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "text_dim": TEXT_CHANNELS,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 3,
            "rope_max_seq_len": 64,
        },
        changes,
    )


def wan_call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = _Random(seed)
    sizes = (size * patch for size, patch in zip(grid, model.config.patch_size))
    return {
        "hidden_states": random(batch, model.config.in_channels, *sizes),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
    }


def hunyuan_video(**changes: Any) -> nn.Module:
    return _seeded(
        HunyuanVideoTransformer3DModel,
        {
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": HEADS,
            "attention_head_dim": HEAD_DIM,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": TEXT_CHANNELS,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (8, 12, 12),
        },
        changes,
    )


def hunyuan_video_call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Rows of the batch have 4, 3, 2, … text tokens that are not padding."""
    random = _Random(seed)
    frames, height, width = grid
    patch = model.config.patch_size
    lengths = torch.arange(4, 4 - batch, -1)
    call = {
        "hidden_states": random(
            batch, model.config.in_channels, frames * model.config.patch_size_t, height * patch, width * patch
        ),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "encoder_attention_mask": (torch.arange(TEXT_TOKENS) < lengths[:, None]).long(),
        "pooled_projections": random(batch, 8),
    }
    return call | ({"guidance": torch.full((batch,), 6000.0)} if model.config.guidance_embeds else {})


def cogvideox(**changes: Any) -> nn.Module:
    return _seeded(
        CogVideoXTransformer3DModel,
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


def cogvideox_call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = _Random(seed)
    frames, height, width = grid
    patch, patch_t = model.config.patch_size, model.config.patch_size_t or 1
    return {
        "hidden_states": random(batch, frames * patch_t, model.config.in_channels, height * patch, width * patch),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
    }


def ltx(**changes: Any) -> nn.Module:
    return _seeded(
        LTXVideoTransformer3DModel,
        {
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": HEADS,
            "attention_head_dim": HEAD_DIM,
            "cross_attention_dim": HEADS * HEAD_DIM,
            "num_layers": 3,
            "caption_channels": TEXT_CHANNELS,
        },
        changes,
    )


def ltx_call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = _Random(seed)
    frames, height, width = grid
    return {
        "hidden_states": random(batch, frames * height * width, model.config.in_channels),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": torch.ones(batch, TEXT_TOKENS),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def flux(**changes: Any) -> nn.Module:
    return _seeded(
        FluxTransformer2DModel,
        {
            "in_channels": CHANNELS,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": HEADS,
            "joint_attention_dim": TEXT_CHANNELS,
            "pooled_projection_dim": 8,
            "axes_dims_rope": (8, 12, 12),
        },
        changes,
    )


def flux_call(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    random = _Random(seed)
    frames, height, width = grid
    return {
        "hidden_states": random(batch, frames * height * width, model.config.in_channels),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, TEXT_CHANNELS),
        "pooled_projections": random(batch, 8),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": image_ids(height, width),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }


def image_ids(height: int, width: int, image: int = 0) -> Tensor:
    """Flux's position ids [height * width, 3] of one image."""
    return torch.cartesian_prod(torch.tensor([image]), torch.arange(height), torch.arange(width)).float()


TINY = {
    "wan": TinyModel(wan, wan_call, tuple(f"blocks.{i}.attn1" for i in range(3))),
    "hunyuan_video": TinyModel(
        hunyuan_video,
        hunyuan_video_call,
        (
            *(f"transformer_blocks.{i}.attn" for i in range(2)),
            *(f"single_transformer_blocks.{i}.attn" for i in range(2)),
        ),
        text_after=TEXT_TOKENS,
    ),
    "cogvideox": TinyModel(
        cogvideox,
        cogvideox_call,
        tuple(f"transformer_blocks.{i}.attn1" for i in range(3)),
        text_before=TEXT_TOKENS,
    ),
    "ltx": TinyModel(ltx, ltx_call, tuple(f"transformer_blocks.{i}.attn1" for i in range(3))),
    "flux": TinyModel(
        flux,
        flux_call,
        (
            *(f"transformer_blocks.{i}.attn" for i in range(2)),
            *(f"single_transformer_blocks.{i}.attn" for i in range(2)),
        ),
        text_before=TEXT_TOKENS,
    ),
}
"""The families by name."""


def tiny_grid(family: str) -> Grid:
    """An odd grid of a few dozen tokens; Flux makes one image."""
    return (1, 7, 5) if family == "flux" else (3, 7, 5)


def tiny_wan_pipeline(seed: int = 0, two_experts: bool = False) -> WanPipeline:
    """A whole WanPipeline with random weights; its transformers' latents have 16 channels."""
    torch.manual_seed(seed)
    tokenizer = _byte_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_CHANNELS,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=wan(in_channels=16, out_channels=16, num_layers=2),
        transformer_2=wan(in_channels=16, out_channels=16, num_layers=2) if two_experts else None,
        boundary_ratio=0.8 if two_experts else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: WanPipeline, *, steps: int = 3, grid: Grid = (2, 3, 5), **changes: Any) -> Tensor:
    """Latents that a tiny Wan pipeline makes, at a grid in tokens; two transformer calls for each step."""
    frames, height, width = grid
    call = {
        "prompt": "a cat",
        "negative_prompt": "bad",
        "num_inference_steps": steps,
        "guidance_scale": 5.0,
        "num_frames": 4 * (frames - 1) + 1,
        "height": 16 * height,
        "width": 16 * width,
        "max_sequence_length": 12,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    return pipeline(**(call | changes)).frames


class _Random:
    """Normal tensors of given sizes, one after the other from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=self.generator)


def _seeded(cls: Callable[..., nn.Module], config: dict[str, Any], changes: dict[str, Any]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(**(config | changes)).eval().requires_grad_(False)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Any text can be encoded, nothing is trained or downloaded."""
    symbols = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )

"""diffusers' pipelines around tiny transformers, which are given their prompts as embeddings."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tiny.model import TEXT_CHANNELS, TEXT_TOKENS
from tiny_models import TINY, tiny_wan_pipeline
from torch import Tensor


def text(tokens: int = TEXT_TOKENS, channels: int = TEXT_CHANNELS) -> Tensor:
    """The embeddings of a prompt, [1, tokens, channels]."""
    return torch.randn(1, tokens, channels, generator=torch.Generator().manual_seed(tokens))


def prompts(**values: Any) -> dict[str, Any]:
    """Values for the prompt, and the same for the negative one."""
    return values | {f"negative_{name}": value for name, value in values.items()}


def without_encoders(pipeline_class: Any, **parts: Any) -> Any:
    """A pipeline that is given its prompt as embeddings."""
    names = ["vae", *(f"{name}{number}" for name in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))]
    wanted = pipeline_class.__init__.__code__.co_varnames
    pipeline = pipeline_class(**({name: None for name in names if name in wanted} | parts))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_wans_encoders(pipeline_class: Any, **parts: Any) -> Any:
    """A pipeline that encodes and decodes as Wan's does."""
    wan = tiny_wan_pipeline()
    pipeline = pipeline_class(tokenizer=wan.tokenizer, text_encoder=wan.text_encoder, vae=wan.vae, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_flux_pipeline(pipeline_class: Any = diffusers.FluxPipeline, **parts: Any) -> Any:
    """A FluxPipeline, or one like it, whose transformer has four layers."""
    return without_encoders(
        pipeline_class,
        transformer=TINY["flux"].make(guidance_embeds=True),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **parts,
    )


def generate_image(pipeline: Any, *, steps: int = 3, **changes: Any) -> Tensor:
    """Latents of 7 x 5 tokens that a pipeline like Flux's makes; one transformer call for each step."""
    call = {
        "prompt_embeds": text(),
        "pooled_prompt_embeds": torch.ones(1, 8),
        "height": 7 * 16,
        "width": 5 * 16,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    return pipeline(**(call | changes)).images

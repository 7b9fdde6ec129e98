"""The nodes, in ComfyUI's first node format: it works in every version since 0.3.60."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from diffsparse.comfy.dense_blocks import parse_dense_blocks
from diffsparse.comfy.heads_image import LEGEND, draw_heads
from diffsparse.comfy.models import MODELS, find_model
from diffsparse.comfy.patch import KEY, Settings, SparsePatch, show_on_node
from diffsparse.comfy.token_count import count_tokens
from diffsparse.config import SparseAttentionConfig
from diffsparse.strategies.adaptive import Adaptive

logger = logging.getLogger(__name__)

DENSITIES = {"auto": 0.25, "quality": 0.4, "balanced": 0.25, "fast": 0.15}
"""What each preset keeps; "custom" goes by the number below it."""

CUSTOM_DENSITY = 0.25
MIN_TOKENS = 12288
"""As in ComfyUI's own sparse node: below it, nothing has shown that sparse attention is faster on a GPU."""


class DiffSparseAttention:
    """Gives out the model with sparse self-attention."""

    DESCRIPTION = (
        "For long videos and large images: computes only the part of self-attention that matters most, found anew for "
        "every head while the model samples, to save time. Put it between the model loader (and LoRAs) and the "
        "sampler. Short sequences, where it would not be faster, stay as they are. A line under the node says what "
        "ran."
    )
    CATEGORY = "model/patch"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    SEARCH_ALIASES = ("sparse attention", "speed up video", "faster attention", "sage attention", "radial attention")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """ComfyUI reads the widgets from here."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that the sampler will use, with its LoRAs."}),
                "enabled": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Off: the model passes through untouched, to the last bit."},
                ),
                "preset": (
                    (*DENSITIES, "custom"),
                    {
                        "default": "auto",
                        "tooltip": (
                            "How much of the attention is computed. auto: 25 %, and with 8 steps or fewer at most "
                            "the first step stays full. quality: 40 %. balanced: 25 %. fast: 15 %. custom: the density "
                            "below. More is closer to the full result, less is faster."
                        ),
                    },
                ),
                "start_percent": (
                    "FLOAT",
                    {
                        "default": 0.2,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": (
                            "Sparse from this point of the sampling on. 0.2 leaves the first fifth full, where the "
                            "scene takes shape. Lower is faster and changes the composition more."
                        ),
                    },
                ),
                "end_percent": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Sparse up to this point of the sampling. 0.9 leaves the last tenth full.",
                    },
                ),
            },
            "optional": {
                "density": (
                    "FLOAT",
                    {
                        "default": CUSTOM_DENSITY,
                        "min": 0.02,
                        "max": 1.0,
                        "step": 0.01,
                        "advanced": True,
                        "tooltip": "Only with preset custom: the share of the attention that is computed, 0.25 for a "
                        "quarter. 1.0 computes all of it.",
                    },
                ),
                "dense_blocks": (
                    "STRING",
                    {
                        "default": "",
                        "advanced": True,
                        "tooltip": "Blocks of the model that stay full, such as 0-2, -1 for the first three and the "
                        "last one. Empty: none.",
                    },
                ),
                "min_tokens": (
                    "INT",
                    {
                        "default": MIN_TOKENS,
                        "min": 0,
                        "max": 1_000_000,
                        "step": 256,
                        "advanced": True,
                        "tooltip": (
                            "Shorter sequences stay full, where sparse attention would not be faster. 12288 are about "
                            "29 frames of 832 x 480 in Wan. DiffSparse Token Count tells the tokens of a latent."
                        ),
                    },
                ),
                "strict": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "advanced": True,
                        "tooltip": "On: stop with an error where attention cannot be sparse, instead of running it "
                        "in full and saying so.",
                    },
                ),
                "verbose": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "advanced": True,
                        "tooltip": "On: write the whole report to the log of ComfyUI.",
                    },
                ),
            },
            "hidden": {"node_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, dense_blocks: str | None = None) -> bool | str:
        """ComfyUI shows what this says at the widget, before anything runs. The text may come from another node."""
        try:
            parse_dense_blocks(dense_blocks or "")
        except ValueError as error:
            return str(error)
        return True

    def patch(
        self,
        model: Any,
        enabled: bool = True,
        preset: str = "auto",
        start_percent: float = 0.2,
        end_percent: float = 1.0,
        density: float = CUSTOM_DENSITY,
        dense_blocks: str = "",
        min_tokens: int = MIN_TOKENS,
        strict: bool = False,
        verbose: bool = False,
        node_id: str | None = None,
    ) -> tuple[Any]:
        """The model with sparse attention, or `model` itself where the node is off or knows nothing of the model.

        Raises:
            ValueError: `dense_blocks` makes no sense for this model, the window ends before it starts, or the model is
                of no known kind and `strict` is on.
        """
        if not enabled:
            show_on_node("DiffSparse: off, the model passes through.", node_id)
            return (model,)
        module = _diffusion_model(model)
        known = find_model(module)
        if known is None:
            message = _unknown(type(module).__name__)
            if strict:
                raise ValueError(message)
            logger.warning(message)
            show_on_node(message, node_id)
            return (model,)
        if start_percent > end_percent:
            raise ValueError(
                f"start_percent {start_percent} is after end_percent {end_percent}, so that nothing would be sparse. "
                f"To switch the node off, set enabled to false."
            )
        blocks = parse_dense_blocks(dense_blocks, len(known.named_blocks(module)))
        if preset != "custom" and density != CUSTOM_DENSITY:
            logger.warning(
                "DiffSparse: density %s has no effect with preset %s, which computes %s. Use preset custom for it.",
                density,
                preset,
                DENSITIES[preset],
            )
        config = SparseAttentionConfig(
            Adaptive(density=DENSITIES.get(preset, density)),
            dense_steps=0.0,
            dense_layers=blocks,
            min_tokens=min_tokens,
            strict=strict,
        )
        settings = Settings(config, start_percent, end_percent, first_step_only=preset == "auto", verbose=verbose)
        return (SparsePatch(settings, known, node_id).put_on(model),)


class DiffSparseReport:
    """Tells what the last run did."""

    DESCRIPTION = (
        "What ran in the last sampling: steps, density, why attention stayed full where it did, and a picture of "
        "what every attention head was found to do. Connect the model that the sampler used, and the sampler's latent."
    )
    CATEGORY = "model/patch"
    RETURN_TYPES = ("STRING", "IMAGE", "LATENT")
    RETURN_NAMES = ("text", "head_classes", "samples")
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """ComfyUI reads the inputs from here."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model from DiffSparse Attention that the sampler used."}),
                "samples": (
                    "LATENT",
                    {"tooltip": "The sampler's latent, so that this node waits for it. It goes out unchanged."},
                ),
            },
            "hidden": {"node_id": "UNIQUE_ID"},
        }

    def report(self, model: Any, samples: Any, node_id: str | None = None) -> dict[str, Any]:
        """Text, picture, and the latent as it came."""
        patch = model.get_attachment(KEY)
        if patch is None:
            text, image = (
                "DiffSparse: this model has no DiffSparse Attention node before it, or it is off.",
                draw_heads(None),
            )
        elif patch.line is None:
            text, image = "DiffSparse: this model has not been sampled yet.", draw_heads(None)
        else:
            report = patch.report()
            text, image = f"{patch.line}\n\n{report}\n\n{LEGEND}", draw_heads(report)
        show_on_node(text, node_id)
        return {"ui": {"text": [text]}, "result": (text, image, samples)}


class DiffSparseTokenCount:
    """Tells how long the sequence of a latent is, and what sparse attention may gain."""

    DESCRIPTION = (
        "How many tokens a latent has in this model, how much of the work attention is, and what may be gained."
    )
    CATEGORY = "model/patch"
    RETURN_TYPES = ("STRING", "INT")
    RETURN_NAMES = ("text", "tokens")
    FUNCTION = "count"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """ComfyUI reads the inputs from here."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that will sample."}),
                "samples": ("LATENT", {"tooltip": "The latent that it will start from. Only its size matters."}),
                "density": (
                    "FLOAT",
                    {
                        "default": CUSTOM_DENSITY,
                        "min": 0.02,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "The share of the attention that would be computed: 0.4 quality, 0.25 auto and "
                        "balanced, 0.15 fast.",
                    },
                ),
            },
            "hidden": {"node_id": "UNIQUE_ID"},
        }

    def count(
        self, model: Any, samples: Any, density: float = CUSTOM_DENSITY, node_id: str | None = None
    ) -> dict[str, Any]:
        """The text and the number of tokens of the grid."""
        module = _diffusion_model(model)
        known = find_model(module)
        if known is None:
            raise ValueError(_unknown(type(module).__name__))
        count = count_tokens(module, known, _latents(samples["samples"]), density)
        show_on_node(str(count), node_id)
        return {"ui": {"text": [str(count)]}, "result": (str(count), count.num_tokens)}


def _unknown(class_name: str) -> str:
    names = ", ".join(model.name for model in MODELS)
    return (
        f"DiffSparse: {class_name} is no diffusion transformer that this node knows ({names}), so the model passes "
        f"through unchanged and nothing is faster. SD 1.5, SDXL and other U-Nets are none."
    )


def _diffusion_model(patcher: Any) -> nn.Module:
    module = patcher.get_model_object("diffusion_model")
    inner: nn.Module = getattr(module, "_orig_mod", module)  # What torch.compile made of it knows it by this name.
    return inner


def _latents(samples: Any) -> Any:
    """The latents as the model gets them: those of video and audio together are a list."""
    return samples.unbind() if getattr(samples, "is_nested", False) else samples


NODE_CLASS_MAPPINGS = {
    "DiffSparseAttention": DiffSparseAttention,
    "DiffSparseReport": DiffSparseReport,
    "DiffSparseTokenCount": DiffSparseTokenCount,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DiffSparseAttention": "DiffSparse Attention",
    "DiffSparseReport": "DiffSparse Report",
    "DiffSparseTokenCount": "DiffSparse Token Count",
}

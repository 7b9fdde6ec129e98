"""The node that makes a model's attention sparse."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from diffsparse.comfy.dense_blocks import parse_dense_blocks
from diffsparse.comfy.models import diffusion_model, find_model, unknown_model
from diffsparse.comfy.node_text import show_on_node
from diffsparse.comfy.patch import Settings, SparsePatch
from diffsparse.comfy.plan_folder import NO_FILE, find_plans, plan_names
from diffsparse.config import SparseAttentionConfig, as_config
from diffsparse.strategies.adaptive import Adaptive
from diffsparse.strategies.calibrated import Calibrated

logger = logging.getLogger(__name__)

DENSITIES = {"auto": 0.25, "quality": 0.4, "balanced": 0.25, "fast": 0.15}
"""What each preset keeps; "custom" goes by the number below it."""

# Lists, since ComfyUI checks a choice against nothing else.
PRESETS = [*DENSITIES, "custom"]
QUANTIZE = ["off", "int8", "int8_int8", "int8_fp8", "fp8"]
CUSTOM_DENSITY = 0.25
AUTO_MIN_TOKENS = -1
"""None of `SparseAttentionConfig.min_tokens`: it is timed."""


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
                    PRESETS,
                    {
                        "default": "auto",
                        "tooltip": (
                            "How much of the attention is computed. auto: 25 %, and with 8 steps or fewer (of both "
                            "samplers, where two share them) at most the first step stays full. quality: 40 %. "
                            "balanced: 25 %. fast: 15 %. custom: the density below. More is closer to the full result, "
                            "less is faster."
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
                        "display_name": "density (preset custom)",
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
                        "default": AUTO_MIN_TOKENS,
                        "min": AUTO_MIN_TOKENS,
                        "max": 1_000_000,
                        "advanced": True,
                        "tooltip": (
                            "Shorter sequences stay full. -1: below 4096 tokens; of longer ones the first call of "
                            "each size is timed, and what is not at least 1.2 times as fast sparse stays full. "
                            "0: none stay full. 16384 are about 41 frames of 832 x 480 in Wan; DiffSparse Token Count "
                            "tells the tokens of a latent."
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
                # Last, since saved workflows name widgets by their place.
                "quantize": (
                    QUANTIZE,
                    {
                        "default": "off",
                        "advanced": True,
                        "tooltip": (
                            "Compute sparse attention in 8 bits, which may be faster and is less exact. int8, and "
                            "int8_int8, which takes the values in 8 bits too: any GPU of the RTX 30 series or newer. "
                            "int8_fp8 and fp8: RTX 40 series or newer, an error elsewhere."
                        ),
                    },
                ),
                "plan_file": (
                    plan_names(),
                    {
                        "default": NO_FILE,
                        "advanced": True,
                        "tooltip": (
                            "A file that DiffSparse Calibrate has made for this very model, size and length: what it "
                            "says is computed, in place of preset and density. Files are in ComfyUI's "
                            "models/diffsparse folder. none: found anew while sampling."
                        ),
                    },
                ),
            },
            "hidden": {"node_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, dense_blocks: str | None = None, plan_file: str | None = None) -> bool | str:
        """ComfyUI shows what this says at the widget, before anything runs. A text may come from another node."""
        try:
            parse_dense_blocks(dense_blocks or "")
            if plan_file not in (None, NO_FILE):
                find_plans(plan_file)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, plan_file: str | None = NO_FILE, **others: Any) -> int:
        """What changes when the plan file does, so that ComfyUI reads it again.

        Args:
            plan_file: its name; None where another node says it, for what changes when any plan file does.
        """
        names = plan_names() if plan_file is None else (plan_file,)
        return sum(find_plans(name).stat().st_mtime_ns for name in names if name != NO_FILE)

    def patch(
        self,
        model: Any,
        enabled: bool = True,
        preset: str = "auto",
        start_percent: float = 0.2,
        end_percent: float = 1.0,
        density: float = CUSTOM_DENSITY,
        dense_blocks: str = "",
        min_tokens: int = AUTO_MIN_TOKENS,
        strict: bool = False,
        verbose: bool = False,
        quantize: str = "off",
        plan_file: str = NO_FILE,
        node_id: str | None = None,
    ) -> tuple[Any]:
        """The model with sparse attention, or `model` itself where the node is off or knows nothing of the model.

        Raises:
            ValueError: there is no such preset, `dense_blocks` makes no sense for this model, the window ends before it
                starts, the plan file cannot be used or is for another model, or the model is of no known kind and
                `strict` is on.
        """
        if not enabled:
            show_on_node("DiffSparse: off, the model passes through.", node_id)
            return (model,)
        module = diffusion_model(model)
        known = find_model(module)
        if known is None:
            message = unknown_model(module)
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
        if preset not in PRESETS:
            raise ValueError(f"preset {preset!r} is none of {', '.join(PRESETS)}.")
        num_blocks = len(known.named_blocks(module))
        blocks = parse_dense_blocks(dense_blocks, num_blocks)
        if plan_file != NO_FILE and (preset, density) != ("auto", CUSTOM_DENSITY):
            logger.warning(
                "DiffSparse: preset %s and density %s have no effect with plan_file %s, which says what is computed.",
                preset,
                density,
                plan_file,
            )
        elif preset != "custom" and density != CUSTOM_DENSITY:
            logger.warning(
                "DiffSparse: density %s has no effect with preset %s, which computes %s. Use preset custom for it.",
                density,
                preset,
                DENSITIES[preset],
            )
        if plan_file == NO_FILE:
            config = SparseAttentionConfig(Adaptive(density=DENSITIES.get(preset, density)))
        else:
            config = as_config(find_plans(plan_file))
            if isinstance(config.strategy, Calibrated):
                config.strategy.check_model(type(module).__name__, num_blocks)
        config = replace(
            config,
            dense_steps=0.0,
            dense_layers=blocks,
            min_tokens=None if min_tokens == AUTO_MIN_TOKENS else min_tokens,
            strict=strict,
            quantization=None if quantize == "off" else quantize,
            # ComfyUI has attention in 8 bits of its own for what stays dense.
            dense_quantization=None,
        )
        settings = Settings(config, start_percent, end_percent, first_step_only=preset == "auto", verbose=verbose)
        return (SparsePatch(settings, known, node_id).put_on(model),)

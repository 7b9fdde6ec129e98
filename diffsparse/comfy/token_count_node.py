"""The node that counts the tokens of a latent."""

from __future__ import annotations

from typing import Any

from diffsparse.comfy.attention_node import CUSTOM_DENSITY
from diffsparse.comfy.models import diffusion_model, find_model, unknown_model
from diffsparse.comfy.node_text import show_on_node
from diffsparse.comfy.token_count import count_tokens


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
        module = diffusion_model(model)
        known = find_model(module)
        if known is None:
            raise ValueError(unknown_model(module))
        count = count_tokens(module, known, _as_sampled(model, samples), density)
        show_on_node(str(count), node_id)
        return {"ui": {"text": [str(count)]}, "result": (str(count), count.num_tokens)}


def _as_sampled(model: Any, samples: Any) -> Any:
    """The latents as the model gets them: those of video and audio together are a list.

    The sampler gives empty ones, which may be made for another model, the size of this model's.
    """
    from comfy.sample import fix_empty_latent_channels

    latents = samples["samples"]
    if getattr(latents, "is_nested", False):
        return latents.unbind()
    # ComfyUI 0.3.64 knows neither, and gives latents neither.
    names = ("downscale_ratio_spacial", "downscale_ratio_temporal")
    return fix_empty_latent_channels(model, latents, **{name: samples[name] for name in names if name in samples})

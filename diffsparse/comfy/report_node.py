"""The node that tells what the last run did."""

from __future__ import annotations

from typing import Any

from diffsparse.comfy.heads_image import LEGEND, draw_heads
from diffsparse.comfy.node_text import show_on_node
from diffsparse.comfy.patch import KEY


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

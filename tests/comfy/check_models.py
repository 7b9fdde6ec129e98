"""Tiny models of ComfyUI for `check_comfyui.py`: how each is made, and what its prompts bring besides text."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

HEADS = {"num_heads": 4, "mlp_ratio": 2.0, "qkv_bias": True, "axes_dim": [4, 6, 6], "hidden_size": 64, "depth": 2}
HUNYUAN = {"vec_in_dim": 32, "context_in_dim": 32, "theta": 256, "depth_single_blocks": 2, "guidance_embed": False}
HUNYUAN |= {"in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "byt5": False, "meanflow": False}
MORE_OF_HUNYUAN = {"use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}
FLUX = HUNYUAN | {"theta": 10000, "patch_size": 2, "txt_ids_dims": []}
WAN = {"model_type": "t2v", "dim": 64, "num_heads": 4, "ffn_dim": 128, "num_layers": 3, "freq_dim": 32, "text_dim": 32}
LTX = {"cross_attention_dim": 64, "attention_head_dim": 16, "num_attention_heads": 4, "caption_channels": 32}

# Name of the configuration in comfy.supported_models, arguments of the model, latents.
MODELS = {
    "Wan": ("WAN21_T2V", {"image_model": "wan2.1", **WAN}, (1, 16, 5, 24, 24)),
    "HunyuanVideo": (
        "HunyuanVideo",
        {"image_model": "hunyuan_video", **HEADS, **HUNYUAN, **MORE_OF_HUNYUAN},
        (1, 16, 5, 24, 24),
    ),
    "Flux": ("Flux", {"image_model": "flux", **HEADS, **FLUX}, (1, 16, 50, 60)),
    "LTXV": ("LTXV", {"image_model": "ltxv", "in_channels": 128, "num_layers": 3, **LTX}, (1, 128, 6, 12, 12)),
}

_MASK = {"attention_mask": torch.ones(1, 16, dtype=torch.long)}
PROMPTS = {"LTXV": _MASK}


@dataclass(frozen=True)
class ImagesToEdit:
    """How a model is given images to edit: the option of a prompt, and where they are in the sequence.

    Attributes:
        where: "before" or "behind" the latent, or "beside" it: one as large, to its right.
        more: what else a prompt has to say.
    """

    where: str
    more: dict[str, str] = field(default_factory=dict)

    def prompt(self, images):
        """The options of a prompt; the first of the images gets next to the latent."""
        if self.where == "beside":
            return {"concat_latent_image": images[0]}
        return {"reference_latents": list(images if self.where == "behind" else reversed(images)), **self.more}


IMAGES = {"Flux": ImagesToEdit("behind")}

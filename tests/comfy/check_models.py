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
SD3 = {"in_channels": 16, "pos_embed_scaling_factor": None, "depth": 2, "qk_norm": "rms", "adm_in_channels": 32}
SD3 |= {"x_block_self_attn_layers": [0], "register_length": 3}
SD3 |= {"context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}}}
HIDREAM = {"patch_size": 2, "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16}
HIDREAM |= {"num_attention_heads": 4, "caption_channels": [32, 32], "text_emb_dim": 32, "axes_dims_rope": [4, 6, 6]}
HIDREAM |= {"llama_layers": [0, 1, 1]}
AURAFLOW = {"cond_seq_dim": 32, "dim": 64, "n_layers": 3, "n_double_layers": 1, "n_heads": 4, "global_conddim": 64}
KREA2 = {"features": 64, "tdim": 32, "txtdim": 16, "heads": 4, "kvheads": 2, "layers": 3, "txtlayers": 2}
KREA2 |= {"txtheads": 2, "txtkvheads": 2}
OMNIGEN2 = {"hidden_size": 64, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2}
OMNIGEN2 |= {"multiple_of": 32, "axes_dim_rope": [4, 6, 6]}
BOOGU = OMNIGEN2 | {"num_double_stream_layers": 1, "instruction_feat_dim": 32}
JOYIMAGE = {"hidden_size": 64, "num_attention_heads": 4, "text_dim": 32, "num_layers": 2, "rope_dim_list": [4, 6, 6]}
IDEOGRAM4 = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "intermediate_size": 128}
IDEOGRAM4 |= {"adaln_dim": 32, "llm_features_dim": 32, "mrope_section": [4, 2, 2]}
MAGE_FLOW = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 32}
MAGE_FLOW |= {"axes_dims_rope": [4, 6, 6]}
PIXELDIT = {"num_groups": 4, "hidden_size": 64, "pixel_hidden_size": 4, "pixel_attn_hidden_size": 32}
PIXELDIT |= {"pixel_num_groups": 2, "patch_depth": 2, "pixel_depth": 1, "patch_size": 4, "txt_embed_dim": 32}
PID = PIXELDIT | {"lq_hidden_dim": 16, "lq_num_res_blocks": 1}

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
    "SD3": ("SD3", SD3, (1, 16, 49, 60)),
    "HiDream": ("HiDream", {"image_model": "hidream", **HIDREAM}, (1, 16, 49, 60)),
    "AuraFlow": ("AuraFlow", AURAFLOW, (1, 4, 49, 60)),
    "Omnigen2": ("Omnigen2", {"image_model": "omnigen2", "text_feat_dim": 32, **OMNIGEN2}, (1, 16, 49, 60)),
    "Boogu": ("Boogu", {"image_model": "boogu", **BOOGU}, (1, 16, 49, 60)),
    "Krea2": ("Krea2", {"image_model": "krea2", **KREA2}, (1, 16, 1, 49, 60)),
    "JoyImage": ("JoyImage", {"image_model": "joyimage", **JOYIMAGE}, (1, 16, 1, 49, 60)),
    "Ideogram4": ("Ideogram4", {"image_model": "ideogram4", **IDEOGRAM4}, (1, 128, 25, 30)),
    "MageFlow": ("MageFlow", {"image_model": "mage_flow", **MAGE_FLOW}, (1, 128, 25, 30)),
    "PixelDiTT2I": ("PixelDiTT2I", {"image_model": "pixeldit_t2i", **PIXELDIT}, (1, 3, 98, 120)),
    "PiD": ("PiD", {"image_model": "pid", **PID}, (1, 3, 98, 120)),
}

_MASK = {"attention_mask": torch.ones(1, 16, dtype=torch.long)}
PROMPTS = {"LTXV": _MASK, "Omnigen2": _MASK, "Boogu": _MASK}
PROMPTS |= {"HiDream": {"conditioning_llama3": torch.linspace(-1, 1, 2 * 16 * 32).sin().reshape(1, 2, 16, 32)}}
PROMPTS |= {"PiD": {"lq_latent": torch.zeros(1, 16, 5, 6), "degrade_sigma": torch.tensor([0.5])}}


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


IMAGES = {name: ImagesToEdit("behind") for name in ("Flux", "JoyImage", "MageFlow")}
IMAGES |= {name: ImagesToEdit("before") for name in ("Omnigen2", "Boogu")}
IMAGES |= {"Krea2": ImagesToEdit("behind", {"reference_latents_method": "index"}), "HiDream": ImagesToEdit("beside")}

"""Nodes that `check_comfyui_server.py` puts into a ComfyUI: tiny random models, prompts and accidents."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import folder_paths
import torch

# Sizes that ComfyUI reads off the weights; what it takes for granted is as it takes it.
HUNYUAN = {"hidden_size": 256, "num_heads": 2, "mlp_ratio": 4.0, "qkv_bias": True, "axes_dim": [16, 56, 56]}
HUNYUAN |= {"depth": 2, "depth_single_blocks": 2, "guidance_embed": False, "in_channels": 16, "out_channels": 16}
JOINT = {"context_in_dim": 64, "vec_in_dim": 768}
LTX = {"attention_head_dim": 16, "num_attention_heads": 32, "cross_attention_dim": 512, "caption_channels": 4096}
WAN = {"model_type": "t2v", "dim": 256, "num_heads": 2, "ffn_dim": 256, "num_layers": 3, "freq_dim": 256, "in_dim": 16}
MODELS = {
    "Wan": ("WAN21_T2V", {"image_model": "wan2.1", **WAN}),
    "HunyuanVideo": (
        "HunyuanVideo",
        {"image_model": "hunyuan_video", "theta": 256, "patch_size": [1, 2, 2], "byt5": False, "meanflow": False}
        | {"use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}
        | HUNYUAN
        | JOINT,
    ),
    "Flux": ("Flux", {"image_model": "flux", "theta": 10000, "patch_size": 2, "txt_ids_dims": [], **HUNYUAN, **JOINT}),
    "LTXV": ("LTXV", {"image_model": "ltxv", "in_channels": 128, "num_layers": 3, **LTX}),
}
TEXT_WIDTH = {"Wan": 4096, "HunyuanVideo": 64, "Flux": 64, "LTXV": 4096, "UNet": 64}
UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1]}
UNET |= {"channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1] * 4, "num_heads": 4}
UNET |= {"transformer_depth_middle": 1, "context_dim": 64, "use_linear_in_transformer": False, "legacy": False}
UNET |= {"use_spatial_transformer": True, "adm_in_channels": None, "use_temporal_attention": False}


def build(name, arguments):
    """A model with random weights, whose attention is sharp enough to notice what is skipped."""
    import check_comfyui

    known = check_comfyui.parameters_of(name)
    arguments = {key: value for key, value in arguments.items() if known is None or key in known}
    return check_comfyui.build(MODELS[name][0] if name in MODELS else "SD15", arguments).model


def save_models():
    """The models as files, which ComfyUI finds by itself; a LoRA for the first."""
    folder = Path(folder_paths.get_folder_paths("diffusion_models")[-1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, arguments) in MODELS.items():
        weights = build(name, arguments).diffusion_model.state_dict()
        weights = {key: weight.contiguous() for key, weight in weights.items()}
        comfy.utils.save_torch_file(weights, str(folder / f"{name}.safetensors"))
    generator = torch.Generator().manual_seed(3)
    layer = "diffusion_model.blocks.1.ffn.0.lora"
    sizes = {"A": (4, 256), "B": (256, 4)}
    lora = {f"{layer}_{end}.weight": torch.randn(size, generator=generator) / 4 for end, size in sizes.items()}
    folder = Path(folder_paths.get_folder_paths("loras")[-1])
    folder.mkdir(parents=True, exist_ok=True)
    comfy.utils.save_torch_file(lora, str(folder / "tiny.safetensors"))


class Check:
    """What the nodes have in common."""

    CATEGORY = "checks"
    FUNCTION = "run"
    RETURN_TYPES = ("MODEL",)
    INPUTS: ClassVar[dict] = {"model": ("MODEL",)}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": cls.INPUTS}


class CheckPrompt(Check):
    RETURN_TYPES = ("CONDITIONING",)
    INPUTS: ClassVar[dict] = {"model_name": ("STRING", {"default": "Wan"}), "seed": ("INT", {"default": 0})}

    def run(self, model_name, seed):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, 16, TEXT_WIDTH[model_name], generator=generator)
        mask = {"attention_mask": torch.ones(1, 16, dtype=torch.long)} if model_name == "LTXV" else {}
        return ([[text, {"pooled_output": torch.randn(1, 768, generator=generator), **mask}]],)


class CheckLatent(Check):
    RETURN_TYPES = ("LATENT",)
    INPUTS: ClassVar[dict] = {"shape": ("STRING", {"default": ""})}

    def run(self, shape):
        return ({"samples": torch.zeros([int(size) for size in shape.split(",")])},)


class CheckOverride(Check):
    """Another node that sets attention, later."""

    def run(self, model):
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *args, **kwargs: f(
            *args, **kwargs
        )
        return (model,)


class CheckOutOfMemory(Check):
    """From now on, or no longer, sparse attention finds no memory."""

    INPUTS: ClassVar[dict] = Check.INPUTS | {"broken": ("BOOLEAN", {"default": True})}
    whole = None

    def run(self, model, broken):
        from diffsparse.plan import AttentionPlan

        def attend(*args, **kwargs):
            raise torch.OutOfMemoryError("as if there were no memory")

        CheckOutOfMemory.whole = CheckOutOfMemory.whole or AttentionPlan.attend
        AttentionPlan.attend = attend if broken else CheckOutOfMemory.whole
        return (model,)


class CheckUNet(Check):
    """A model that is no diffusion transformer."""

    INPUTS: ClassVar[dict] = {}

    def run(self):
        cpu = torch.device("cpu")
        return (comfy.model_patcher.ModelPatcher(build("UNet", UNET), cpu, cpu),)


NODE_CLASS_MAPPINGS = {
    node.__name__: node for node in (CheckPrompt, CheckLatent, CheckOverride, CheckOutOfMemory, CheckUNet)
}
if os.environ.get("CHECK_SAVES_MODELS"):
    save_models()

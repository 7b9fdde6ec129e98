"""Checks of the node in a real ComfyUI, with tiny random models on the CPU: `python check_comfyui.py PATH_OF_COMFYUI`.

Run it by the Python of that ComfyUI, with diffsparse installed there. It needs no weights, takes a few minutes, and
was written against 0.3.64 and 0.33. It prints a line for each model and exits with 1 if any check fails.
"""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path

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


def build(name, arguments):
    """A patcher of the model with random weights, whose attention is sharp enough to notice what is skipped."""
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, name)(dict(arguments))
    config.unet_config = dict(arguments)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, weight in model.diffusion_model.named_parameters():
            if weight.ndim >= 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5)
            else:
                sharp = "query_norm" in key or "norm_q" in key or "q_norm" in key
                weight.fill_(3.0 if sharp else float("norm" in key or key.endswith(".weight")))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), cpu, cpu)


def parameters_of(name):
    """What the parameters of a model are called in this version, to leave out what it does not know."""
    import comfy.ldm.flux.model
    import comfy.ldm.hunyuan_video.model

    known = {"Flux": comfy.ldm.flux.model.FluxParams, "HunyuanVideo": comfy.ldm.hunyuan_video.model.HunyuanVideoParams}
    return {*inspect.signature(known[name]).parameters, "image_model"} if name in known else None


def condition(name, seed):
    """A random prompt."""
    generator = torch.Generator().manual_seed(seed)
    mask = {"attention_mask": torch.ones(1, 16, dtype=torch.long)} if name == "LTXV" else {}
    text = torch.randn(1, 16, 32, generator=generator)
    return [[text, {"pooled_output": torch.randn(1, 32, generator=generator), **mask}]]


def sample(model, name, shape):
    """Six steps of Euler with guidance."""
    import comfy.sample

    latents = torch.zeros(shape)
    noise = comfy.sample.prepare_noise(latents, 0)
    positive, negative = condition(name, 1), condition(name, 2)
    return comfy.sample.sample(model, noise, 6, 4.0, "euler", "simple", positive, negative, latents, seed=0)


def check(name, model, shape):
    """Name and result of each check of one model."""
    from diffsparse.comfy import NODE_CLASS_MAPPINGS

    def patched(model, **settings):
        settings = {"preset": "custom", "min_tokens": 0, "strict": True} | settings
        return NODE_CLASS_MAPPINGS["DiffSparseAttention"]().patch(model, **settings)[0]

    def distance(latents):
        return ((latents - dense).norm() / dense.norm()).item()

    def later(function, *args, **kwargs):
        return function(*args, **kwargs)

    dense = sample(model, name, shape)
    sparse = sample(patched(model, density=0.2), name, shape)
    followed = patched(model, density=0.2)
    followed.model_options["transformer_options"]["optimized_attention_override"] = later
    return {
        "finite": bool(torch.isfinite(sparse).all()),
        "deterministic": torch.equal(sparse, sample(patched(model, density=0.2), name, shape)),
        "closer with more": distance(sparse) > distance(sample(patched(model, density=0.6), name, shape)) > 1e-4,
        "equal with all": distance(sample(patched(model, density=1.0), name, shape)) < 1e-4,
        "a later override": torch.equal(sparse, sample(followed, name, shape)),
        "two nodes": torch.equal(sparse, sample(patched(patched(model, density=0.6), density=0.2), name, shape)),
        "bit-equal off": torch.equal(dense, sample(patched(model, enabled=False), name, shape)),
    }


def main(path):
    """Check every model; 1 if any check fails."""
    sys.argv[1:] = ["--cpu", "--use-pytorch-cross-attention", "--force-fp32"]
    sys.path.insert(0, str(path))
    os.chdir(path)
    import comfy.options

    comfy.options.enable_args_parsing()
    passed = True
    for name, (config, arguments, shape) in MODELS.items():
        known = parameters_of(name)
        arguments = {key: value for key, value in arguments.items() if known is None or key in known}
        results = check(name, build(config, arguments), shape)
        passed &= all(results.values())
        print(name, ", ".join(f"{check}: {'yes' if result else 'NO'}" for check, result in results.items()))
    return 0 if passed else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]).resolve()))

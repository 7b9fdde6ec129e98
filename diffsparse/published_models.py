"""Transformers as published, without weights, and calls of them: large tensors have only a shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Configurations of the Hugging Face hub; what is not here is the default of the class.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "wan": ("WanTransformer3DModel", {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}),
    "wan-1.3b": ("WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", {}),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 48,
            "num_layers": 42,
            "patch_size_t": 2,
            "patch_bias": False,
            "use_rotary_positional_embeddings": True,
        },
    ),
    "ltx": ("LTXVideoTransformer3DModel", {}),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "qwen_image": ("QwenImageTransformer2DModel", {}),
}
"""Wan 2.1 14B and 1.3B, HunyuanVideo, CogVideoX 1.5 5B, LTX-Video 2B, FLUX.1 and Qwen-Image: class and config."""


def published_transformer(name: str) -> nn.Module:
    """The transformer of this name on the meta device: modules and shapes, no weights.

    Raises:
        ValueError: a name that is not in `PUBLISHED`.
    """
    import diffusers

    if name not in PUBLISHED:
        raise ValueError(f"`--family` must be one of {', '.join(PUBLISHED)}, got {name!r}.")
    class_name, config = PUBLISHED[name]
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, class_name)(**config)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Call:
    """How one class is called.

    Attributes:
        frames, pixels: what the published VAE makes one of: video frames, pixels a side; 0 frames for images.
        patch: latent pixels a side of a token; 1 where the pipeline packs them before the call.
        arguments: (config, latent frames, height, width) -> named arguments of a call of batch 1.
    """

    frames: int
    pixels: int
    patch: int
    arguments: Callable[[Any, int, int, int], dict[str, Any]]


def make_call(
    transformer: nn.Module, height: int, width: int, num_frames: int, vae: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Named arguments of one call of the transformer for a video, or an image, of this many pixels.

    What a pipeline draws or encodes is on the meta device; masks, timestep, guidance and places are as it gives them.
    The text is as long as the pipeline pads it, or at most lets it be. `vae` is how many frames and pixels a side
    become one, where it is not the published VAE.

    Raises:
        ValueError: a class that is not in `CALLS`, or a size that the model cannot make.
    """
    name = type(transformer).__name__
    config: Any = transformer.config
    if name not in CALLS:
        raise ValueError(
            f"the sizes of a call of {name} are not known; those of {', '.join(CALLS)} are. "
            f"A new one is a function in published_models.py and a line in its CALLS."
        )
    call = CALLS[name]
    frames, pixels = vae if vae is not None and call.frames else (call.frames, call.pixels)
    # Wan 2.2 5B, the only one with 48 channels, has a VAE of its own.
    if vae is None and name == "WanTransformer3DModel" and config["in_channels"] == 48:
        pixels = 16
    for side, value in (("height", height), ("width", width)):
        if value < 1 or value % (pixels * call.patch):
            raise ValueError(
                f"`{side}` of {name} must be a positive multiple of {pixels * call.patch} pixels, got {value}."
            )
    if not frames:
        if num_frames != 1:
            raise ValueError(f"{name} makes images: `num_frames` must be 1, got {num_frames}.")
        return call.arguments(config, 1, height // pixels, width // pixels)
    if num_frames < 1 or (num_frames - 1) % frames:
        raise ValueError(
            f"`num_frames` of {name} must be 1 more than a multiple of {frames}, got {num_frames}. "
            f"Say {max(0, num_frames - 1) // frames * frames + 1}."
        )
    return call.arguments(config, (num_frames - 1) // frames + 1, height // pixels, width // pixels)


def _tensor(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _timestep(value: float = 500.0) -> Tensor:
    return torch.full((1,), value)


def _mask(tokens: int) -> Tensor:
    return torch.ones(1, tokens, dtype=torch.long)


def _wan(config: Any, frames: int, height: int, width: int) -> dict[str, Any]:
    return {
        "hidden_states": _tensor(1, config["in_channels"], frames, height, width),
        "encoder_hidden_states": _tensor(1, 512, config["text_dim"]),
        "timestep": _timestep(),
    }


def _hunyuan_video(config: Any, frames: int, height: int, width: int) -> dict[str, Any]:
    return {
        "hidden_states": _tensor(1, config["in_channels"], frames, height, width),
        "encoder_hidden_states": _tensor(1, 256, config["text_embed_dim"]),
        "encoder_attention_mask": _mask(256),
        "pooled_projections": _tensor(1, config["pooled_projection_dim"]),
        "timestep": _timestep(),
    } | _guidance(config, 6000.0)


def _cogvideox(config: Any, frames: int, height: int, width: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    patch = config["patch_size_t"] or 1
    # The pipeline fills up the last patch in time.
    patches = -(-frames // patch)
    call = {
        "hidden_states": _tensor(1, patches * patch, config["in_channels"], height, width),
        "encoder_hidden_states": _tensor(1, config["max_text_seq_length"], config["text_embed_dim"]),
        "timestep": _timestep(),
    }
    if config["use_rotary_positional_embeddings"]:
        size = height // config["patch_size"], width // config["patch_size"]
        call["image_rotary_emb"] = get_3d_rotary_pos_embed(
            config["attention_head_dim"], None, size, patches, grid_type="slice", max_size=size
        )
    return call


def _ltx(config: Any, frames: int, height: int, width: int) -> dict[str, Any]:
    return {
        "hidden_states": _tensor(1, frames * height * width, config["in_channels"]),
        "encoder_hidden_states": _tensor(1, 128, config["caption_channels"]),
        "encoder_attention_mask": _mask(128),
        "timestep": _timestep(),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def _flux(config: Any, frames: int, height: int, width: int) -> dict[str, Any]:
    places = (torch.arange(size) for size in (1, height, width))
    return {
        "hidden_states": _tensor(1, height * width, config["in_channels"]),
        "encoder_hidden_states": _tensor(1, 512, config["joint_attention_dim"]),
        "pooled_projections": _tensor(1, config["pooled_projection_dim"]),
        "timestep": _timestep(0.5),
        "img_ids": torch.cartesian_prod(*places).float(),
        "txt_ids": torch.zeros(512, 3),
    } | _guidance(config, 3.5)


def _qwen_image(config: Any, frames: int, height: int, width: int) -> dict[str, Any]:
    return {
        "hidden_states": _tensor(1, height * width, config["in_channels"]),
        "encoder_hidden_states": _tensor(1, 512, config["joint_attention_dim"]),
        "timestep": _timestep(0.5),
        "img_shapes": [[(1, height, width)]],
    }


def _guidance(config: Any, value: float) -> dict[str, Any]:
    return {"guidance": torch.full((1,), value)} if config["guidance_embeds"] else {}


# Image pipelines pack 2 x 2 latent pixels of 8 x 8 pixels before they call the transformer.
CALLS = {
    "WanTransformer3DModel": Call(4, 8, 2, _wan),
    "HunyuanVideoTransformer3DModel": Call(4, 8, 2, _hunyuan_video),
    "CogVideoXTransformer3DModel": Call(4, 8, 2, _cogvideox),
    "LTXVideoTransformer3DModel": Call(8, 32, 1, _ltx),
    "FluxTransformer2DModel": Call(0, 16, 1, _flux),
    "QwenImageTransformer2DModel": Call(0, 16, 1, _qwen_image),
}
"""By class name."""

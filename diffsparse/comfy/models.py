"""The diffusion transformers of ComfyUI: which blocks attend to the video, and where its tokens sit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffsparse.pipelines.family import Layout, num_alike


@dataclass(frozen=True)
class ComfyModel:
    """Models of ComfyUI that lay out their tokens alike.

    Attributes:
        name: what the report calls it.
        classes: class names of the `diffusion_model`. A subclass has to be named too: it may lay out its tokens anew.
        blocks: attributes that hold the blocks, in the order they run. The first attention of a block is its
            self-attention; what else a block attends to (text, audio) stays dense.
        width: attribute with the channels of its attention, all heads together, or the path to it.
        layout: given the model and the named arguments of one call of it, where the tokens sit.
        wrapper: the wrapper of ComfyUI that sees these calls.
        padding_mask: whether a mask that reaches self-attention hides nothing but padded text.
    """

    name: str
    classes: tuple[str, ...]
    blocks: tuple[str, ...]
    width: str
    layout: Callable[[Any, Mapping[str, Any]], Layout]
    wrapper: str = "diffusion_model"
    padding_mask: bool = False

    @property
    def text_apart(self) -> bool | None:
        """None: ComfyUI cuts no sequence over ranks."""
        return None

    def named_blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        """The blocks of `model` by name, in the order they are numbered."""
        return {
            f"{attribute}.{name}": block
            for attribute in self.blocks
            if isinstance(holder := getattr(model, attribute, None), nn.Module)
            for name, block in holder.named_children()
        }


def find_model(model: nn.Module) -> ComfyModel | None:
    """The entry of `MODELS` that names the class of a `diffusion_model`."""
    return next((entry for entry in MODELS if type(model).__name__ in entry.classes), None)


def diffusion_model(patcher: Any) -> nn.Module:
    """The model in a ModelPatcher of ComfyUI, under what torch.compile put around it."""
    return uncompiled(patcher.get_model_object("diffusion_model"))


def uncompiled(module: nn.Module) -> nn.Module:
    """What torch.compile was given; the module itself where it is not compiled."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner


def unknown_model(model: nn.Module) -> str:
    """What a node says of a model that is not in `MODELS`."""
    names = ", ".join(known.name for known in MODELS)
    return (
        f"DiffSparse: {type(model).__name__} is no diffusion transformer that this node knows ({names}), so the model "
        f"passes through unchanged and nothing is faster. SD 1.5, SDXL and other U-Nets are none."
    )


def _grid(latents: Tensor, patch: tuple[int, ...], *more_frames: Tensor | None) -> tuple[int, int, int]:
    """Frames, height and width in tokens.

    Args:
        latents: [B, C, frames, height, width] or [B, C, height, width]. ComfyUI pads each axis to whole patches.
        patch: latent pixels a token along frames, height and width.
        more_frames: latents [B, C, frames, ...] that the model joins to the frames, each padded on its own.
    """
    *frames, height, width = latents.shape[2:]
    clips = [frames[0] if frames else 1, *(clip.shape[2] for clip in more_frames if clip is not None)]
    return sum(-(-clip // patch[0]) for clip in clips), -(-height // patch[1]), -(-width // patch[2])


def _frames(images: Sequence[Tensor], patch: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
    """The grid of an image with those next to it that are as large as frames, and how many tokens the others have."""
    sizes = [_grid(latents, patch) for latents in images]
    alike = num_alike(sizes)
    frames, height, width = sizes[0]
    return (alike * frames, height, width), sum(map(math.prod, sizes[alike:]))


def _wan(model: Any, call: Mapping[str, Any]) -> Layout:
    """[reference image | video, context as large | other context], each but the video only where there is any."""
    before = 0
    if getattr(model, "ref_conv", None) is not None and (reference := call.get("reference_latent")) is not None:
        before = (reference.shape[-2] // model.patch_size[1]) * (reference.shape[-1] // model.patch_size[2])
    frames, height, width = _grid(call["x"], model.patch_size, call.get("time_dim_concat"))
    for context in call.get("context_latents") or ():
        more_frames, *size = _grid(context, model.patch_size)
        if size != [height, width]:
            break
        frames += more_frames
    return Layout(frames, height, width, before, None)


def _wan_scail(model: Any, call: Mapping[str, Any]) -> Layout:
    """[reference images as frames, then the video's | pose]."""
    more = (call.get("time_dim_concat"), call.get("reference_latent"))
    return Layout(*_grid(call["x"], model.patch_size, *more), 0, None)


def _hunyuan_video(model: Any, call: Mapping[str, Any]) -> Layout:
    """[text, reference image | video], or [reference image | video | text] where the blocks say so.

    HunyuanImage is one frame.
    """
    patch = tuple(model.patch_size) if len(model.patch_size) == 3 else (1, *model.patch_size)
    grid = _grid(call["x"], patch)
    if not getattr(next(iter(model.double_blocks), None), "flipped_img_txt", False):
        return Layout(*grid, None, 0)
    reference = call.get("ref_latent")
    return Layout(*grid, 0 if reference is None else math.prod(_grid(reference, patch)), None)


def _flux(model: Any, call: Mapping[str, Any]) -> Layout:
    """[what a node puts before the text, text | image, references as large as frames | other references]."""
    images = (call["x"], *(call.get("ref_latents") or ()))
    grid, others = _frames(images, (1, model.patch_size, model.patch_size))
    return Layout(*grid, None, others)


def _chroma(model: Any, call: Mapping[str, Any]) -> Layout:
    """[what a node puts before the text, text | image]. References are handed to the model, which leaves them out."""
    return _flux(model, {"x": call["x"]})


def _sd3(model: Any, call: Mapping[str, Any]) -> Layout:
    """[registers, text | image]."""
    return Layout(*_grid(call["x"], (1, model.patch_size, model.patch_size)), None, 0)


def _ideogram4(model: Any, call: Mapping[str, Any]) -> Layout:
    """[text | image, a token for each latent pixel]; without a prompt the image alone."""
    return Layout(*_grid(call["x"], (1, 1, 1)), None, 0)


def _krea2(model: Any, call: Mapping[str, Any]) -> Layout:
    """[text | image, references as large as frames | other references], those only where something says how."""
    method = call.get("ref_latents_method", model.default_ref_method)
    references = () if method is None else call.get("ref_latents") or ()
    grid, others = _frames((call["x"], *references), (1, model.patch, model.patch))
    return Layout(*grid, None, others)


def _omnigen2(model: Any, call: Mapping[str, Any]) -> Layout:
    """[text, other references | references as large as frames, image]."""
    images = (call["x"], *reversed(call.get("ref_latents") or ()))
    grid, _ = _frames(images, (1, model.patch_size, model.patch_size))
    return Layout(*grid, None, 0)


def _joyimage(model: Any, call: Mapping[str, Any]) -> Layout:
    """[image, references as large as frames | other references, text]."""
    grid, _ = _frames((call["x"], *(call.get("ref_latents") or ())), model.patch_size)
    return Layout(*grid, 0, None)


def _hidream(model: Any, call: Mapping[str, Any]) -> Layout:
    """[image, and what it is an edit of to its right | text]."""
    height, width = call["x"].shape[2:]
    if (source := call.get("image_cond")) is not None:
        width += source.shape[-1]
    return Layout(1, -(-height // model.patch_size), -(-width // model.patch_size), 0, None)


def _cogvideox(model: Any, call: Mapping[str, Any]) -> Layout:
    """[text | video]."""
    grid = _grid(call["x"], (model.patch_size_t or 1, model.patch_size, model.patch_size))
    return Layout(*grid, call["context"].shape[1], 0)


def _ltx(model: Any, call: Mapping[str, Any]) -> Layout:
    """The video alone, a token for each latent pixel, and guides as its last frames; LTX-2 has its audio apart.

    [video | guides] where guides have fewer tokens a frame: where its mask is negative the model leaves tokens out.
    """
    latents = call["x"][0] if isinstance(call["x"], (list, tuple)) else call["x"]
    frames, height, width = _grid(latents, (1, 1, 1))
    guides, mask = call.get("keyframe_idxs"), call.get("denoise_mask")
    if guides is None or mask is None or not bool((mask < 0).any()):
        return Layout(frames, height, width)
    return Layout(frames - guides.shape[2] // (height * width), height, width, 0, None)


def _cosmos(model: Any, call: Mapping[str, Any]) -> Layout:
    """The video alone."""
    return Layout(*_grid(call["x"], (model.patch_temporal, model.patch_spatial, model.patch_spatial)))


def _kandinsky5(model: Any, call: Mapping[str, Any]) -> Layout:
    """The video alone."""
    return Layout(*_grid(call["x"], model.patch_size))


def _mochi(model: Any, call: Mapping[str, Any]) -> Layout:
    """[video | text]."""
    return Layout(*_grid(call["x"], (1, model.patch_size, model.patch_size)), 0, None)


def _lumina(model: Any, call: Mapping[str, Any]) -> Layout:
    """[text, reference images | image, reference frames as large | other ones, padding to a multiple].

    The padding only in Z-Image and Ming-Image, of which the latter alone has more frames than one.
    """
    patch = (1, model.patch_size, model.patch_size)
    frames, height, width = _grid(call["x"], patch)
    references = [_grid(latents, patch) for latents in call.get("ref_frames") or ()]
    alike = num_alike([(1, height, width), *references]) - 1
    others = sum(map(math.prod, references[alike:]))
    multiple = getattr(model, "pad_tokens_multiple", None) or 1
    padding = -((frames + alike) * height * width + others) % multiple
    return Layout(frames + alike, height, width, None, others + padding)


def _minimax_h3(model: Any, call: Mapping[str, Any]) -> Layout:
    """[text, keyframes, references, audio | video], packed."""
    return Layout(*_grid(call["x"][0], model.patch_size), None, 0)


MODELS: tuple[ComfyModel, ...] = (
    ComfyModel(
        name="wan",
        classes=("WanModel", "CameraWanModel", "AnimateWanModel", "WanModel_S2V", "HumoWanModel", "WanDancerModel"),
        blocks=("blocks",),
        width="dim",
        layout=_wan,
    ),
    ComfyModel("wan_vace", ("VaceWanModel",), ("blocks", "vace_blocks"), "dim", _wan),
    ComfyModel("wan_scail", ("SCAILWanModel", "SCAIL2WanModel"), ("blocks",), "dim", _wan_scail),
    ComfyModel("hunyuan_video", ("HunyuanVideo",), ("double_blocks", "single_blocks"), "hidden_size", _hunyuan_video),
    ComfyModel("flux", ("Flux",), ("double_blocks", "single_blocks"), "hidden_size", _flux),
    ComfyModel("chroma", ("Chroma", "ChromaRadiance"), ("double_blocks", "single_blocks"), "hidden_size", _chroma),
    ComfyModel(
        name="qwen_image",
        classes=("QwenImageTransformer2DModel", "MageFlowTransformer2DModel"),
        blocks=("transformer_blocks",),
        width="inner_dim",
        layout=_flux,
    ),
    ComfyModel(
        name="sd3",
        classes=("OpenAISignatureMMDITWrapper",),
        blocks=("joint_blocks",),
        width="hidden_size",
        layout=_sd3,
        wrapper="apply_model",
    ),
    ComfyModel("auraflow", ("MMDiT",), ("double_layers", "single_layers"), "init_x_linear.out_features", _sd3),
    ComfyModel("pixeldit", ("PixDiT_T2I", "PidNet"), ("patch_blocks",), "hidden_size", _sd3),
    ComfyModel("ideogram4", ("Ideogram4Transformer2DModel",), ("layers",), "input_proj.out_features", _ideogram4),
    ComfyModel("krea2", ("SingleStreamDiT",), ("blocks",), "first.out_features", _krea2),
    ComfyModel(
        name="omnigen2",
        classes=("OmniGen2Transformer2DModel",),
        blocks=("layers",),
        width="hidden_size",
        layout=_omnigen2,
        wrapper="apply_model",
    ),
    ComfyModel(
        name="boogu",
        classes=("BooguTransformer2DModel",),
        blocks=("double_stream_layers", "single_stream_layers"),
        width="hidden_size",
        layout=_omnigen2,
        wrapper="apply_model",
    ),
    ComfyModel(
        name="joyimage",
        classes=("JoyImageTransformer3DModel",),
        blocks=("double_blocks",),
        width="img_in.out_channels",
        layout=_joyimage,
        wrapper="apply_model",
    ),
    ComfyModel(
        name="hidream",
        classes=("HiDreamImageTransformer2DModel",),
        blocks=("double_stream_blocks", "single_stream_blocks"),
        width="inner_dim",
        layout=_hidream,
    ),
    ComfyModel("cogvideox", ("CogVideoXTransformer3DModel",), ("blocks",), "dim", _cogvideox),
    ComfyModel("ltx", ("LTXVModel", "LTXAVModel"), ("transformer_blocks",), "inner_dim", _ltx),
    ComfyModel("cosmos", ("GeneralDIT", "MiniTrainDIT", "Anima"), ("blocks",), "model_channels", _cosmos),
    ComfyModel("kandinsky5", ("Kandinsky5",), ("visual_transformer_blocks",), "model_dim", _kandinsky5),
    ComfyModel("mochi", ("AsymmDiTJoint",), ("blocks",), "hidden_size_x", _mochi, wrapper="apply_model"),
    ComfyModel("lumina", ("NextDiT", "NextDiTPixelSpace"), ("layers",), "dim", _lumina),
    ComfyModel("minimax_h3", ("MiniMaxH3Model",), ("blocks",), "blocks.0.attn.out_proj.in_features", _minimax_h3),
)
"""Every model that the node can make sparse, by the class names of ComfyUI 0.3.64 and 0.33."""

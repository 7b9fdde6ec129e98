"""Small stand-ins for what ComfyUI 0.3.64 and 0.33 do around a model, written from what the two were seen to do.

They stand for: `folder_paths` (folders by kind, in the order they are searched), `comfy.patcher_extension` (wrappers in
order, each given an executor), `comfy.sample` (empty latents in the model's size), ModelPatcher's clone, wrappers,
attachments and model_options, the attention functions' override, and a sampler that gives each call of the model its
sigmas, conditions and uuids in `transformer_options`.
"""

from __future__ import annotations

import copy
import sys
import types
import uuid
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsparse.comfy.attention_node import DiffSparseAttention

WRAPPERS = {"OUTER_SAMPLE": "outer_sample", "APPLY_MODEL": "apply_model", "DIFFUSION_MODEL": "diffusion_model"}


def install(monkeypatch, models_dir: Path) -> None:
    """Make what the nodes import of ComfyUI, and `sys.modules["folder_paths"]`, find a stand-in."""
    sample = types.ModuleType("comfy.sample")
    sample.fix_empty_latent_channels = fix_empty_latent_channels
    monkeypatch.setitem(sys.modules, "comfy.sample", sample)
    extension = types.ModuleType("comfy.patcher_extension")
    extension.WrappersMP = types.SimpleNamespace(**WRAPPERS)
    monkeypatch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", extension)
    monkeypatch.setitem(sys.modules, "folder_paths", FolderPaths(models_dir))


class FolderPaths(types.ModuleType):
    """ComfyUI's folders of models. A kind that nobody has named is a KeyError."""

    def __init__(self, models_dir: Path) -> None:
        super().__init__("folder_paths")
        self.models_dir = str(models_dir)
        self.folder_names_and_paths: dict = {}

    def add_model_folder_path(self, kind, folder):
        paths, _ = self.folder_names_and_paths.setdefault(kind, ([], set()))
        if folder not in paths:
            paths.append(folder)

    def get_folder_paths(self, kind):
        return self.folder_names_and_paths[kind][0]

    def get_filename_list(self, kind):
        paths, suffixes = self.folder_names_and_paths[kind]
        files = [(file, path) for path in map(Path, paths) for file in path.rglob("*") if file.is_file()]
        return sorted(str(file.relative_to(path)) for file, path in files if not suffixes or file.suffix in suffixes)

    def get_full_path(self, kind, name):
        return next((str(Path(path, name)) for path in self.get_folder_paths(kind) if Path(path, name).is_file()), None)


def fix_empty_latent_channels(model, latents, downscale_ratio_spacial=None, downscale_ratio_temporal=None):
    """Empty latents [B, C, frames, height, width] made for another VAE in the size of this model's, as in 0.33."""
    if downscale_ratio_spacial is None or torch.count_nonzero(latents):
        return latents
    ratio = downscale_ratio_spacial / model.get_model_object("latent_format").spacial_downscale_ratio
    height, width = (round(size * ratio) for size in latents.shape[-2:])
    return F.interpolate(latents, (latents.shape[2], height, width))


class Executor:
    """Calls the wrappers one inside the other, then the function (`WrapperExecutor` in both versions)."""

    def __init__(self, original, class_obj, wrappers) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, list(wrappers)

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        first, *rest = self.wrappers
        return first(Executor(self.original, self.class_obj, rest), *args, **kwargs)


def wrappers_of(transformer_options, kind):
    return [w for keyed in transformer_options.get("wrappers", {}).get(kind, {}).values() for w in keyed]


class Patcher:
    """A ModelPatcher: clones share the model, not their options."""

    def __init__(self, diffusion_model: nn.Module) -> None:
        self.diffusion_model = diffusion_model
        self.model_options = {"transformer_options": {}}
        self.wrappers: dict = {}
        self.attachments: dict = {}

    def clone(self):
        other = Patcher(self.diffusion_model)
        other.model_options = self.model_options | {
            "transformer_options": dict(self.model_options["transformer_options"])
        }
        other.wrappers = {kind: {key: list(w) for key, w in keyed.items()} for kind, keyed in self.wrappers.items()}
        other.attachments = dict(self.attachments)
        return other

    def get_model_object(self, name):
        latents = types.SimpleNamespace(spacial_downscale_ratio=16)
        return {"diffusion_model": self.diffusion_model, "model_sampling": Flow(), "latent_format": latents}[name]

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def get_wrappers(self, kind, key):
        return self.wrappers.get(kind, {}).get(key, [])

    def set_attachments(self, key, attachment):
        self.attachments[key] = attachment

    def get_attachment(self, key):
        return self.attachments.get(key)


class Flow:
    """The sampling of a flow model without shift: sigma falls from 1 to 0 with the share that is done."""

    def percent_to_sigma(self, percent):
        return 1.0 - percent


class Guider:
    """A CFGGuider with two conditions, in one batch as ComfyUI runs them where memory allows, or in two calls."""

    def __init__(self, patcher: Patcher, split: bool = False) -> None:
        self.model_patcher = patcher
        self.split = split
        self.uuids = {0: uuid.uuid4(), 1: uuid.uuid4()}
        self.seen_options: list[dict] = []

    def sample(self, latents: Tensor, sigmas: Tensor, texts: dict[int, Tensor], on_step=None) -> Tensor:
        options = copy.copy(self.model_patcher.model_options["transformer_options"])
        options["wrappers"] = self.model_patcher.wrappers
        run = Executor(self._outer_sample, self, wrappers_of(options, "outer_sample"))
        return run(latents, sigmas, texts, options, on_step)

    def _outer_sample(self, latents, sigmas, texts, options, on_step):
        for step, sigma in enumerate(sigmas[:-1]):
            calls = [[1], [0]] if self.split else [[1, 0]]
            outputs = {}
            for kinds in calls:
                call_options = {
                    **options,
                    "sample_sigmas": sigmas,
                    "sigmas": sigma[None],
                    "cond_or_uncond": kinds,
                    "uuids": [self.uuids[kind] for kind in kinds],
                }
                batch = latents.expand(len(kinds), *latents.shape[1:])
                text = torch.cat([texts[kind] for kind in kinds])
                out = self._apply_model(batch, sigma.expand(len(kinds)), None, text, None, call_options)
                self.seen_options.append(call_options)
                outputs |= dict(zip(kinds, out.chunk(len(kinds))))
            velocity = outputs[1] + 2.0 * (outputs[0] - outputs[1])
            latents = latents + (sigmas[step + 1] - sigma) * velocity
            if on_step is not None:
                on_step(step)
        return latents

    def _apply_model(self, x, t, c_concat, c_crossattn, control, transformer_options):
        inner = self.model_patcher
        run = Executor(self._apply, inner, wrappers_of(transformer_options, "apply_model"))
        return run(x, t, c_concat, c_crossattn, control, transformer_options)

    def _apply(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        model = self.model_patcher.diffusion_model
        return model(x, t, context=c_crossattn, control=control, transformer_options=transformer_options)


def attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    """ComfyUI's attention function without an override, [B, S, H * D] unless told otherwise."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (-1, q.shape[-1] // heads)).transpose(1, 2) for x in (q, k, v))
    gqa = kwargs.get("enable_gqa", False)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=kwargs.get("scale"), enable_gqa=gqa)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def optimized_attention(*args, **kwargs):
    """The same through the override in `transformer_options`, which gets the function and everything as it came."""
    options = kwargs.get("transformer_options") or {}
    if "_inside_attn_wrapper" not in kwargs and "optimized_attention_override" in options:
        return options["optimized_attention_override"](attention, *args, **kwargs, _inside_attn_wrapper=True)
    return attention(*args, **kwargs)


class Projections(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x, context=None, options=None, **kwargs):
        context = x if context is None else context
        q, k, v = self.q(x), self.k(context), self.v(context)
        # A sharp softmax, so that what is skipped is seen in the output.
        q = 3 * F.normalize(q, dim=-1) * q.shape[-1] ** 0.5
        return self.o(optimized_attention(q, k, v, heads=self.heads, transformer_options=options, **kwargs))


class HeadByHead(Projections):
    """Attention of one head at a time, as a node makes it that saves memory."""

    def forward(self, x, context=None, options=None, **kwargs):
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q = 3 * F.normalize(q, dim=-1) * self.q.out_features**0.5
        outputs = [
            optimized_attention(*one, 1, skip_reshape=True, transformer_options=options)
            for one in zip(*(part.split(1, dim=1) for part in (q, k, v)))
        ]
        return self.o(torch.cat(outputs, -1))


class WanBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = Projections(width, heads), Projections(width, heads)

    def forward(self, x, context, transformer_options={}, mask=None):  # noqa: B006
        x = x + self.self_attn(x, options=transformer_options, mask=mask)
        return x + self.cross_attn(x, context, options=transformer_options)


class Toy(nn.Module):
    """A diffusion transformer that calls attention as those of ComfyUI do."""

    def forward(self, x, timestep, context, control=None, transformer_options={}, **kwargs):  # noqa: B006
        run = Executor(self._forward, self, wrappers_of(transformer_options, "diffusion_model"))
        return run(x, timestep, context, control, transformer_options, **kwargs)


class WanModel(Toy):
    """Self-attention of the video with heads by name, then cross-attention, as Wan in both versions."""

    def __init__(self, layers: int = 2, width: int = 32, heads: int = 2, mask: Tensor | None = None) -> None:
        super().__init__()
        self.patch_size, self.dim, self.ref_conv, self.mask = (1, 2, 2), width, None, mask
        self.patch_embedding = nn.Conv3d(4, width, (1, 2, 2), (1, 2, 2))
        self.head = nn.Linear(width, 16)
        self.blocks = nn.ModuleList(WanBlock(width, heads) for _ in range(layers))

    def _forward(self, x, timestep, context, control=None, transformer_options={}, **kwargs):  # noqa: B006
        x = self.patch_embedding(x) + timestep[:, None, None, None, None]
        frames, height, width = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = self.run_block(block, x, context, transformer_options)
        x = self.head(x).view(-1, frames, height, width, 4, 1, 2, 2)
        return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)

    def run_block(self, block, x, context, transformer_options):
        return block(x, context, transformer_options, self.mask)


class WanModel_S2V(WanModel):
    """Tells its blocks no options, as in 0.3.64."""

    def run_block(self, block, x, context, transformer_options):
        return block(x, context=context)


class AsymmDiTJoint(WanModel):
    """Mochi: of its calls only those of the model around it are seen."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.patch_size, self.hidden_size_x = 2, self.dim


class HunyuanVideo(Toy):
    """A text refiner, then blocks over [text | video] in heads-first layout, as HunyuanVideo in 0.33."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.patch_size, self.hidden_size, self.heads = (1, 2, 2), width, heads
        self.img_in = nn.Conv3d(4, width, (1, 2, 2), (1, 2, 2))
        self.final_layer = nn.Linear(width, 16)
        self.txt_in = Projections(width, heads)
        self.double_blocks = nn.ModuleList([JointBlock(width, heads)])
        self.single_blocks = nn.ModuleList([JointBlock(width, heads)])

    def _forward(self, x, timestep, context, control=None, transformer_options={}, **kwargs):  # noqa: B006
        x = self.img_in(x) + timestep[:, None, None, None, None]
        frames, height, width = x.shape[2:]
        text = context + self.txt_in(context, options=transformer_options)
        x = torch.cat([text, x.flatten(2).transpose(1, 2)], 1)
        for block in (*self.double_blocks, *self.single_blocks):
            x = block(x, transformer_options)
        x = self.final_layer(x[:, text.shape[1] :]).view(-1, frames, height, width, 4, 1, 2, 2)
        return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


class JointBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width, bias=False)

    def forward(self, x, transformer_options):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = 3 * F.normalize(q, dim=-1) * q.shape[-1] ** 0.5
        return x + optimized_attention(q, k, v, self.heads, skip_reshape=True, transformer_options=transformer_options)


class UNetModel(nn.Module):
    """No diffusion transformer."""


def sample(patcher: Patcher, steps: int = 5, split: bool = False, frames: int = 5, on_step=None) -> Tensor:
    """Latents after `steps` steps, the same for the same model."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, frames, 20, 16, generator=generator)
    texts = {kind: torch.randn(1, 6, 32, generator=generator) for kind in (0, 1)}
    sigmas = torch.linspace(1, 0, steps + 1)
    with torch.no_grad():
        return Guider(patcher, split).sample(latents, sigmas, texts, on_step)


def patched(model: Patcher, **settings) -> Patcher:
    """The model as the node gives it out, at any length of sequence unless the settings say otherwise."""
    (sparse,) = DiffSparseAttention().patch(model, **({"preset": "custom", "min_tokens": 0} | settings))
    return sparse


def patcher(model_class=WanModel, **kwargs) -> Patcher:
    """A model with the same random weights at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Patcher(model_class(**kwargs).eval())


def head_by_head() -> Patcher:
    """The same model with self-attention of one head at a time."""
    model = patcher()
    for block in model.diffusion_model.blocks:
        apart = HeadByHead(32, 2)
        apart.load_state_dict(block.self_attn.state_dict())
        block.self_attn = apart
    return model

"""Seconds of a denoising step of real transformers, dense and sparse, with random weights and some of their layers.

Speed with random weights is honest; what comes out is not looked at.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

NUM_LAYERS = 1
STEPS = 4
"""A plan is kept this long by default, so one step in this many pays for planning."""


@dataclass(frozen=True)
class Subject:
    """A transformer and one call of it.

    Attributes:
        class_name: of diffusers.
        config: of the model as published; a number of layers is put in its place.
        layers: the entries of the config that say how many layers there are.
        inputs: shapes of the call's tensors.
        constants: what else the call takes, as numbers for a batch of one.
        extras: makes what is left, on the default device.
    """

    class_name: str
    config: dict[str, Any]
    layers: dict[str, int]
    inputs: dict[str, tuple[int, ...]]
    constants: dict[str, float]
    extras: Callable[[], dict[str, Any]] = dict

    @property
    def num_layers(self) -> int:
        """Of the whole model."""
        return sum(self.layers.values())

    def build(self, device: torch.device, dtype: torch.dtype, num_layers: int) -> nn.Module:
        """The transformer with `num_layers` of each kind."""
        import diffusers
        import torch

        with torch.device(device):
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                model: nn.Module = getattr(diffusers, self.class_name)(
                    **self.config, **{name: min(num_layers, total) for name, total in self.layers.items()}
                )
            finally:
                torch.set_default_dtype(before)
        return model.eval().requires_grad_(False)

    def call(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of one call, fresh."""
        import torch

        tensors = {name: torch.randn(shape, device=device, dtype=dtype) for name, shape in self.inputs.items()}
        numbers = {name: torch.full((1,), value, device=device) for name, value in self.constants.items()}
        with torch.device(device):
            extras = self.extras()
        return tensors | numbers | extras | {"return_dict": False}


def _flux_ids() -> dict[str, torch.Tensor]:
    import torch

    image = torch.zeros(64, 64, 3)
    image[..., 1] += torch.arange(64)[:, None]
    image[..., 2] += torch.arange(64)
    return {"img_ids": image.reshape(-1, 3), "txt_ids": torch.zeros(512, 3)}


def _hunyuan_mask() -> dict[str, torch.Tensor]:
    import torch

    return {"encoder_attention_mask": torch.ones(1, 256, dtype=torch.long)}


def _cogvideox_rotary(frames: int, height: int, width: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Cosines and sines for this many tokens; the pipeline makes them outside of the transformer."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    head_dim, size = 64, (height, width)
    rotary = get_3d_rotary_pos_embed(head_dim, None, size, frames, grid_type="slice", max_size=size)
    return {"image_rotary_emb": rotary}


# The configurations are those of the models as published on the Hugging Face hub.
SUBJECTS = {
    "Wan 2.1 14B, 720p, 81 frames": Subject(
        "WanTransformer3DModel",
        {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824},
        {"num_layers": 40},
        {"hidden_states": (1, 16, 21, 90, 160), "encoder_hidden_states": (1, 512, 4096)},
        {"timestep": 500},
    ),
    "HunyuanVideo, 720p, 129 frames": Subject(
        "HunyuanVideoTransformer3DModel",
        {},
        {"num_layers": 20, "num_single_layers": 40},
        {
            "hidden_states": (1, 16, 33, 90, 160),
            "encoder_hidden_states": (1, 256, 4096),
            "pooled_projections": (1, 768),
        },
        {"timestep": 500, "guidance": 6000},
        _hunyuan_mask,
    ),
    "CogVideoX 1.5, 768p, 81 frames": Subject(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 48,
            "patch_size_t": 2,
            "patch_bias": False,
            "use_rotary_positional_embeddings": True,
        },
        {"num_layers": 42},
        # 81 frames are 21 latents, which the pipeline fills up to 22.
        {"hidden_states": (1, 22, 16, 96, 170), "encoder_hidden_states": (1, 226, 4096)},
        {"timestep": 500},
        functools.partial(_cogvideox_rotary, 11, 48, 85),
    ),
    "FLUX.1, 1024 x 1024": Subject(
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        {"num_layers": 19, "num_single_layers": 38},
        {
            "hidden_states": (1, 4096, 64),
            "encoder_hidden_states": (1, 512, 4096),
            "pooled_projections": (1, 768),
        },
        {"timestep": 0.5, "guidance": 3.5},
        _flux_ids,
    ),
}


def bench_transformer(
    subject: Subject, device: torch.device, config: Any, rounds: int, num_layers: int = NUM_LAYERS
) -> dict[str, Any]:
    """Seconds of a step, dense and sparse in turn: medians over rounds of `STEPS` steps, planning included.

    Args:
        subject: what is measured.
        device: a GPU, or a CPU for trying.
        config: as for `enable_sparse_attention`; its dense steps are left out. By default all stays dense where sparse
            attention is not faster, and the density is None.
        rounds: how often dense and sparse take turns.
        num_layers: of each kind; the model has more.
    """
    import dataclasses

    import torch

    from diffsparse.config import as_config
    from diffsparse.enable import disable_sparse_attention, enable_sparse_attention, sparse_attention_report
    from diffsparse.speed_check import seconds_of

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: Any = subject.build(device, dtype, num_layers)
    call = subject.call(device, dtype)
    config = dataclasses.replace(as_config(config), dense_steps=0.0)
    ran = 0

    def steps() -> None:
        nonlocal ran
        with torch.no_grad():
            for _ in range(STEPS):
                ran += 1
                model(**call | {"timestep": call["timestep"] * (1 - 1e-3 * (ran % STEPS))})

    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
    report = None
    for number in range(rounds + 1):
        took = {"dense": seconds_of(steps, device)}
        enable_sparse_attention(model, config)
        took["sparse"] = seconds_of(steps, device)
        report = sparse_attention_report(model)
        disable_sparse_attention(model)
        if number > 0:
            for name, value in took.items():
                seconds[name].append(value / STEPS)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    built = sum(min(num_layers, total) for total in subject.layers.values())
    assert report is not None
    return {
        "layers_measured": built,
        "layers_of_model": subject.num_layers,
        "seconds_per_step": medians,
        "speed_up": statistics.median(a / b for a, b in zip(seconds["dense"], seconds["sparse"])),
        "density": report.density,
    }

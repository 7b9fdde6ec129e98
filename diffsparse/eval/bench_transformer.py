"""Seconds of a denoising step of real transformers, dense and sparse, with random weights and some of their layers.

Speed with random weights is honest; what comes out is not looked at.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

STEPS = 4
"""A plan is kept this long by default, so one step in this many pays for planning."""


@dataclass(frozen=True)
class Subject:
    """A published transformer and the size of what it makes."""

    family: str
    height: int
    width: int
    num_frames: int


SUBJECTS = {
    "Wan 2.1 14B, 720p, 81 frames": Subject("wan", 720, 1280, 81),
    "HunyuanVideo, 720p, 129 frames": Subject("hunyuan_video", 720, 1280, 129),
    "CogVideoX 1.5, 768p, 81 frames": Subject("cogvideox", 768, 1360, 81),
    "FLUX.1, 1024 x 1024": Subject("flux", 1024, 1024, 1),
}
"""By the name of the geometry in `bench_suite.SUITES`."""


def bench_transformer(
    whole: nn.Module, call: Mapping[str, Any], device: torch.device, config: Any, rounds: int
) -> dict[str, Any]:
    """Seconds of a step, dense and sparse in turn: medians over rounds of `STEPS` steps, planning included.

    Args:
        whole: the transformer with all its layers, without weights.
        call: of `make_call`; what is on the meta device is drawn.
        device: a GPU, or a CPU for trying.
        config: as for `enable_sparse_attention`; its dense steps are left out. By default all stays dense where sparse
            attention is not faster, and the density is None.
        rounds: how often dense and sparse take turns.
    """
    import dataclasses

    import torch
    from torch.utils._pytree import tree_map_only

    from diffsparse.config import as_config
    from diffsparse.eval.generate import sparse_attention
    from diffsparse.speed_check import seconds_of

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = with_few_layers(whole, device, dtype)
    arguments = tree_map_only(
        torch.Tensor,
        lambda x: torch.randn(x.shape, device=device, dtype=dtype) if x.is_meta else x.to(device),
        {**call, "return_dict": False},
    )
    config = dataclasses.replace(as_config(config), dense_steps=0.0)
    ran = 0

    def steps() -> None:
        nonlocal ran
        with torch.no_grad():
            for _ in range(STEPS):
                ran += 1
                model(**arguments | {"timestep": arguments["timestep"] * (1 - 1e-3 * (ran % STEPS))})

    dense, sparse = [], []
    for _ in range(rounds + 1):
        dense.append(seconds_of(steps, device) / STEPS)
        with sparse_attention(model, config) as report:
            sparse.append(seconds_of(steps, device) / STEPS)
            density = report().density
    # The first round is not counted.
    dense, sparse = dense[1:], sparse[1:]
    return {
        "layers_measured": sum(_layer_counts(model).values()),
        "layers_of_model": sum(_layer_counts(whole).values()),
        "seconds_per_step": {"dense": statistics.median(dense), "sparse": statistics.median(sparse)},
        "speed_up": statistics.median(a / b for a, b in zip(dense, sparse)),
        "density": density,
    }


def with_few_layers(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A new transformer of the same config with at most one layer of each kind."""
    import torch

    few = {name: min(1, total) for name, total in _layer_counts(model).items()}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return type(model).from_config(model.config, **few).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def _layer_counts(model: Any) -> dict[str, int]:
    """The entries of a transformer's config that say how many layers of each kind there are."""
    return {name: model.config[name] for name in ("num_layers", "num_single_layers") if name in model.config}

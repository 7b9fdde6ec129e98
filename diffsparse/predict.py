"""What sparse attention is expected to save, before anything runs: from shapes and from what was measured elsewhere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffsparse.call_flops import CallFlops
from diffsparse.config import SparseAttentionConfig, as_config, resolve_dense_layers
from diffsparse.grid import TokenGrid
from diffsparse.pipelines.families import find_family
from diffsparse.published_models import make_call
from diffsparse.speed_check import LEAST_SPEED_UP
from diffsparse.strategies.adaptive import Adaptive


@dataclass(frozen=True)
class KernelSpeed:
    """How fast sparse attention is beside dense attention.

    Attributes:
        efficiency: by density, the speed-up of a sparse call over `F.scaled_dot_product_attention`, times the density.
        tail: what the pooled tail takes, as a share of that dense call.
        planning_seconds: of making one plan, by the numbers of a query, S times H times D.
        permuting_seconds: of permuting the tokens of one call, by the same.
        dense_flops_per_second: of `F.scaled_dot_product_attention`.
        source: where that is from.
    """

    efficiency: Mapping[float, float]
    tail: float
    planning_seconds: Mapping[float, float]
    permuting_seconds: Mapping[float, float]
    dense_flops_per_second: float
    source: str


def between(measured: Mapping[float, float], at: float) -> float:
    """The value between measured ones by a straight line, beyond them as at the last."""
    known = sorted(measured)
    lower = max((x for x in known if x <= at), default=known[0])
    upper = min((x for x in known if x >= at), default=known[-1])
    part = (at - lower) / (upper - lower) if upper > lower else 0.0
    return measured[lower] * (1 - part) + measured[upper] * part


MEASURED = {
    ("H200", "bfloat16"): KernelSpeed(
        {0.1: 0.93, 0.2: 0.98, 0.25: 1.0, 0.3: 0.99, 0.5: 0.98, 1.0: 1.05},
        tail=0.036,
        planning_seconds={14.2e6: 0.0053, 138.6e6: 0.0093, 365.7e6: 0.0288, 387.1e6: 0.0255},
        permuting_seconds={14.2e6: 0.0001, 138.6e6: 0.0003, 365.7e6: 0.0008, 387.1e6: 0.0008},
        dense_flops_per_second=569e12,
        source="from measurements on an H200 in bfloat16 on 2026-11-28, kernel and dense call at the least favourable "
        "of three sizes (docs/benchmarks.md)",
    )
}
"""By a part of the GPU's name and what attention computes in. Of docs/benchmarks/h200.json, which a test holds."""

ASSUMED_EFFICIENCY = 0.9


@dataclass(frozen=True)
class SparseAttentionPrediction:
    """What is expected of sparse attention in one transformer; no number in it was measured on this model.

    Flops are those of one dense call of the transformer for a batch of one; guidance doubles all alike.

    Attributes:
        transformer: its class.
        grid: the tokens of one self-attention call.
        num_heads, head_dim, num_layers: of self-attention.
        num_sparse_layers: those that are sparse in the sparse steps; 0 where `why_dense` says why.
        num_steps, num_dense_steps: denoising steps, and how many of them are dense.
        attention_flops: 4 S^2 D H of every self-attention layer.
        other_flops: linear layers, convolutions and other attention; no norms, activations or rotary embedding.
        density: expected share of key blocks that sparse calls compute exactly.
        plan_bytes: that the plans of all layers keep; None for strategies that do not say.
        num_plans: how often each layer is planned in a generation.
        efficiency: speed-up of the kernel over dense attention, times the density.
        tail: what the pooled tail takes, as a share of a dense call; 0 where there is none, and where nobody knows.
        dense_call_seconds: of one layer's self-attention, dense.
        planning_seconds, permuting_seconds: of one plan and of one call.
        source: where these five are from.
        why_dense: why no step is sparse; None where some are.
    """

    transformer: str
    grid: TokenGrid
    num_heads: int
    head_dim: int
    num_layers: int
    num_sparse_layers: int
    num_steps: int
    num_dense_steps: int
    attention_flops: int
    other_flops: int
    density: float
    plan_bytes: int | None
    num_plans: int
    efficiency: float
    tail: float
    dense_call_seconds: float
    planning_seconds: float
    permuting_seconds: float
    source: str
    why_dense: str | None

    @property
    def attention_share(self) -> float:
        """Share of self-attention in the flops of a dense step."""
        return self.attention_flops / self.dense_flops

    @property
    def dense_flops(self) -> int:
        """Of a dense step."""
        return self.attention_flops + self.other_flops

    @property
    def sparse_flops(self) -> float:
        """Of a sparse step, without those of planning."""
        return self.dense_flops - self._sparse_part * (1 - self.density)

    @property
    def overall_density(self) -> float:
        """Density over all steps and layers, dense ones counted as 1."""
        sparse = self.num_sparse_layers / self.num_layers * self._num_sparse_steps / self.num_steps
        return 1 - sparse * (1 - self.density)

    @property
    def call_speed_up(self) -> float:
        """Of a mean sparse call over a dense one, planning and permuting included; 1 where no step is sparse."""
        if not self._num_sparse_steps:
            return 1.0
        beside = self.permuting_seconds + self.planning_seconds * self.num_plans / self._num_sparse_steps
        return 1 / (self.density / self.efficiency + self.tail + beside / self.dense_call_seconds)

    @property
    def step_speed_up(self) -> float:
        """Of a mean sparse step over a dense one."""
        return self.dense_flops / (self.dense_flops + self._sparse_part * (1 / self.call_speed_up - 1))

    @property
    def speed_up(self) -> float:
        """Of all denoising steps together, by Amdahl's law. Text encoder and VAE are not in it."""
        return self.num_steps / (self.num_dense_steps + self._num_sparse_steps / self.step_speed_up)

    @property
    def _num_sparse_steps(self) -> int:
        return self.num_steps - self.num_dense_steps

    @property
    def _sparse_part(self) -> float:
        """Dense flops of the layers that become sparse."""
        return self.attention_flops * self.num_sparse_layers / self.num_layers

    def as_dict(self) -> dict[str, Any]:
        """Fields and figures as plain dicts and numbers."""
        names = ("attention_share", "dense_flops", "sparse_flops", "overall_density")
        speed_ups = ("call_speed_up", "step_speed_up", "speed_up")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in (*names, *speed_ups)}

    def __str__(self) -> str:
        grid, text = self.grid, self.grid.text_before + self.grid.text_after
        rows = {
            "tokens": f"{grid.num_tokens:,}: {grid.frames} x {grid.height} x {grid.width}, {text} text",
            "self-attention": f"{self.num_layers} layers, {self.num_heads} heads x {self.head_dim}",
            "FLOPs of a dense step": f"{self.dense_flops / 1e12:,.1f} T, {self.attention_share:.0%} self-attention",
        }
        if self.why_dense is not None:
            rows["speed-up"] = f"none, all stays dense: {self.why_dense}"
        else:
            plans = "not known for this strategy" if self.plan_bytes is None else f"{self.plan_bytes / 1e6:,.0f} MB"
            rows |= {
                "FLOPs of a sparse step": f"{self.sparse_flops / 1e12:,.1f} T",
                "steps": f"{self.num_steps}, the first {self.num_dense_steps} dense",
                "density": f"{self.density:.1%} of sparse calls, {self.overall_density:.1%} of all",
                "memory of plans": f"{plans}, {self.num_sparse_layers} layers",
                "speed-up of a sparse step": f"{self.step_speed_up:.2f}x",
                "speed-up of all steps": f"{self.speed_up:.2f}x, without text encoder and VAE",
            }
        lines = [f"{name:<26}{value}" for name, value in rows.items()]
        tail = f"the pooled tail {self.tail:.1%} of it, " if self.tail else ""
        lines.append(
            f"This is a prediction, not a measurement. Kernel at {self.efficiency:.0%} of linear against PyTorch's "
            f"dense attention, a dense call {self.dense_call_seconds * 1e3:.1f} ms, {tail}a plan "
            f"{self.planning_seconds * 1e3:.1f} ms, permuting {self.permuting_seconds * 1e3:.1f} ms: "
            f"{self.source}. Linear layers are taken to reach as many FLOP/s as dense attention, and the rest of a "
            f"step to take no time."
        )
        return "\n".join((f"{self.transformer}, predicted", *lines))


def predict_sparse_attention(
    model: Any,
    *,
    height: int,
    width: int,
    num_frames: int = 1,
    num_inference_steps: int = 50,
    config: SparseAttentionConfig | str | None = None,
    density: float | None = None,
    gpu: str | None = None,
    efficiency: float | None = None,
) -> SparseAttentionPrediction:
    """What sparse attention is expected to save a pipeline or a transformer; neither is called, nor its weights read.

    Args:
        model: a diffusers pipeline, whose `transformer` counts, or a transformer.
        height, width, num_frames: of the video or image, in pixels and frames.
        num_inference_steps: denoising steps.
        config: as for `enable_sparse_attention`.
        density: in place of that of `Adaptive`; of other strategies the one you expect, which must be said.
        gpu: whose measured speed is taken, "H200"; None for the GPU of this machine.
        efficiency: speed-up of the kernel over dense attention times the density, where you know it better.

    Raises:
        ValueError: a size that the model cannot make, a model whose sizes are not known, or a number out of its range.
        TypeError: `model` is neither a pipeline with a transformer nor a transformer.
    """
    transformer = model if isinstance(model, nn.Module) else getattr(model, "transformer", None)
    transformer = getattr(transformer, "_orig_mod", transformer)
    if not isinstance(transformer, nn.Module):
        raise TypeError(f"`model` must be a pipeline with a transformer, or a transformer, got {type(model).__name__}.")
    _check_positive(num_inference_steps=num_inference_steps, density=density, efficiency=efficiency)
    if density is not None and density > 1:
        raise ValueError(f"`density` must be at most 1, got {density}. For 25 % say 0.25.")
    chosen = as_config(config)
    call = make_call(transformer, height, width, num_frames, _vae(model))
    family = find_family(transformer)
    layout = family.layout(transformer, call) if family is not None else None
    assert family is not None
    assert layout is not None
    grid = TokenGrid(*layout)  # type: ignore[arg-type]
    names = family.layer_names(transformer)
    flops = CallFlops.of(transformer, names, call)
    (_, num_heads, num_tokens, head_dim), _ = flops.attention[0]
    assert (num_tokens, len(flops.attention)) == (grid.num_tokens, len(names))

    dense_layers = resolve_dense_layers(chosen.dense_layers, len(names), type(transformer).__name__)
    num_dense_steps = round(chosen.dense_steps * num_inference_steps)
    num_sparse_layers = len(names) - len(dense_layers)

    strategy = chosen.strategy
    if isinstance(strategy, Adaptive) and density is not None:
        strategy = dataclasses.replace(strategy, density=density)
    if isinstance(strategy, Adaptive):
        density = strategy.executed_density(grid)
    elif density is None:
        raise ValueError(
            f"what {type(strategy).__name__} computes depends on the video: say `density`, as a report of it shows."
        )
    speed = _kernel_speed(gpu, chosen.quantization, efficiency)
    source = speed.source
    if chosen.dense_quantization is not None:
        source += f"; dense steps and layers as the model computes them, not in {chosen.dense_quantization}"
    attention_flops = sum(each for _, each in flops.attention)
    sparse = SparseAttentionPrediction(
        transformer=type(transformer).__name__,
        grid=grid,
        num_heads=num_heads,
        head_dim=head_dim,
        num_layers=len(names),
        num_sparse_layers=num_sparse_layers,
        num_steps=num_inference_steps,
        num_dense_steps=num_dense_steps,
        attention_flops=attention_flops,
        other_flops=flops.other,
        density=density,
        plan_bytes=num_sparse_layers * strategy.plan_bytes(grid, num_heads) if isinstance(strategy, Adaptive) else None,
        num_plans=-(-(num_inference_steps - num_dense_steps) // chosen.replan_every),
        efficiency=between(speed.efficiency, density),
        tail=speed.tail if isinstance(strategy, Adaptive) and strategy.tail else 0.0,
        dense_call_seconds=attention_flops / len(names) / speed.dense_flops_per_second,
        planning_seconds=between(speed.planning_seconds, num_tokens * num_heads * head_dim),
        permuting_seconds=between(speed.permuting_seconds, num_tokens * num_heads * head_dim),
        source=source,
        why_dense=None,
    )
    if grid.num_tokens < chosen.fewest_tokens:
        why_dense = f"fewer than {chosen.fewest_tokens:,} tokens"
    elif num_dense_steps == num_inference_steps:
        why_dense = "all steps are dense steps"
    elif chosen.min_tokens is None and sparse.call_speed_up < LEAST_SPEED_UP:
        why_dense = (
            f"sparse attention is predicted to be {sparse.call_speed_up:.2f}x as fast as dense attention and used from "
            f"{LEAST_SPEED_UP}x on; it is timed when the model runs"
        )
    else:
        return sparse
    return dataclasses.replace(
        sparse,
        num_sparse_layers=0,
        num_dense_steps=num_inference_steps,
        num_plans=0,
        plan_bytes=0,
        why_dense=why_dense,
    )


def _vae(pipeline: Any) -> tuple[int, int] | None:
    """How many frames and pixels a side the VAE of a pipeline makes one of; None where it does not say."""
    for names in (
        ("vae_scale_factor_temporal", "vae_scale_factor_spatial"),
        ("vae_temporal_compression_ratio", "vae_spatial_compression_ratio"),
    ):
        if all(hasattr(pipeline, name) for name in names):
            frames, pixels = (int(getattr(pipeline, name)) for name in names)
            return frames, pixels
    return None


def _kernel_speed(gpu: str | None, quantization: str | None, efficiency: float | None) -> KernelSpeed:
    """What is known of the GPU, with the user's efficiency in place of the measured one."""
    if gpu is None:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU here"
    computes_in = quantization or "bfloat16"
    known = next((s for (part, kind), s in MEASURED.items() if part in gpu and kind == computes_in), None)
    if known is not None and efficiency is None:
        return known
    closest = known or MEASURED["H200", "bfloat16"]
    seconds = "seconds as on an H200"
    if efficiency is not None:
        source = f"efficiency as you said, {seconds}"
        return dataclasses.replace(closest, efficiency={1.0: efficiency}, tail=0.0, source=source)
    return dataclasses.replace(
        closest,
        efficiency={1.0: ASSUMED_EFFICIENCY},
        tail=0.0,
        source=f"unknown hardware ({gpu}, {computes_in}): kernel efficiency assumed {ASSUMED_EFFICIENCY}, say "
        f"--efficiency or --gpu H200; {seconds}",
    )


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` must be above 0, got {value}.")
        if value == math.inf:
            raise ValueError(f"`{name}` must be finite, got {value}.")

"""`diffsparse bench --suite NAME`: the kernel at the sizes of real models, against what attention is at hand.

A part at a time, and the file is written after each: started again, it goes on with what is missing. Every part draws
fresh inputs, checks sampled rows against float64, then times all candidates in turn, round after round, so that the
clocks of a GPU under load favour none of them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsparse.eval.bench_transformer import SUBJECTS, bench_transformer
from diffsparse.eval.dense_attention import EXACT, dense_candidates
from diffsparse.eval.output_file import reading, write_json
from diffsparse.eval.random_attention import (
    BLOCK_SIZE,
    error_of_sampled_rows,
    mean_density,
    random_inputs,
    random_lists,
    sparse_call,
)
from diffsparse.eval.sparse_peers import sparse_peers
from diffsparse.eval.timing import seconds_in_rounds
from diffsparse.grid import TokenGrid

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.25)
PRECISIONS = ("native", "int8", "int8_int8", "int8_fp8", "fp8")
TAIL = " + tail"
"""Ends the names of calls with the pooled tail in all heads, before their density."""
PAIRS = ", 64 keys a block"
"""Ends those of calls with blocks of 64 keys, most strategies' default; all others have BLOCK_SIZE."""
KEYS_OF_PAIRS = 64
DENSITY_OF_BOTH = 0.25
PRESET, QUANTIZATION = "balanced", "int8_fp8"
# Relative error of sampled rows against float64: rounding of bf16, or of scores, weights and values to INT8 or FP8.
LARGEST_ERRORS = {"native": 1e-2, "int8": 2e-2, "int8_int8": 2.5e-2, "int8_fp8": 6e-2, "fp8": 8e-2}


@dataclass(frozen=True)
class Geometry:
    """Attention of one model at one size."""

    name: str
    grid: TokenGrid
    heads: int
    head_dim: int


SUITES: dict[str, tuple[Geometry, ...]] = {
    # Sizes: the models' published configurations; grids are latent pixels by patch size.
    "gpu": (
        Geometry("Wan 2.1 14B, 720p, 81 frames", TokenGrid(21, 45, 80), 40, 128),
        Geometry("HunyuanVideo, 720p, 129 frames", TokenGrid(33, 45, 80, text_after=256), 24, 128),
        Geometry("CogVideoX 1.5, 768p, 81 frames", TokenGrid(11, 48, 85, text_before=226), 48, 64),
        Geometry("FLUX.1, 1024 x 1024", TokenGrid(1, 64, 64, text_before=512), 24, 128),
    ),
    "tiny": (
        Geometry("a tiny video", TokenGrid(3, 8, 16), 2, 64),
        Geometry("a tiny image with text", TokenGrid(1, 16, 16, text_before=20), 2, 32),
    ),
}


def run_suite(name: str, output: Path, device: torch.device, say: Callable[[str], None], rounds: int) -> None:
    """Measure what `output` does not hold yet, and add it."""
    from diffsparse.eval.environment import describe_machine
    from diffsparse.published_models import make_call, published_transformer

    machine = describe_machine(device)
    today = datetime.now(timezone.utc).date().isoformat()
    record: dict[str, Any] = {"suite": name, "machine": machine, "date": today, "attention": {}, "transformers": {}}
    if output.exists():
        with reading(f"`--output` {output} holds no results of a suite", "Name another file, or remove this one."):
            found = json.loads(output.read_text(encoding="utf-8"))
            # With all that a record has.
            record = {key: found[key] for key in record}
        if (record["suite"], record["machine"]) != (name, machine):
            raise ValueError(
                f"`--output` {output} holds suite {record['suite']!r} of another machine or version, "
                f"{record['machine']}. Name another file, or remove this one."
            )
    for geometry in SUITES[name]:
        if geometry.name not in record["attention"]:
            record["attention"][geometry.name] = asdict(geometry) | measure(geometry, device, rounds, say)
            write_json(output, record)
    for geometry in SUITES[name]:
        subject = SUBJECTS.get(geometry.name)
        if subject is None or geometry.name in record["transformers"]:
            continue
        model = published_transformer(subject.family)
        call = make_call(model, subject.height, subject.width, subject.num_frames)
        results = {}
        for title, config in _configs().items():
            try:
                results[title] = bench_transformer(model, call, device, config, max(1, rounds // 2))
            except ValueError as error:
                say(f"{geometry.name}: {title} cannot run: {error}")
                continue
            say(f"{geometry.name}: {title}: {results[title]['speed_up']:.2f}x a step")
        record["transformers"][geometry.name] = results
        write_json(output, record)


def _configs() -> dict[str, Any]:
    """What transformers are timed with: the preset, the same in 8 bits, and dense attention in 8 bits."""
    from diffsparse.config import as_config
    from diffsparse.strategies.all_blocks import AllBlocks

    preset: Any = as_config(PRESET)
    in_8_bits = replace(preset, quantization=QUANTIZATION)
    return {
        PRESET: preset,
        f"{PRESET}, {QUANTIZATION}": in_8_bits,
        f"dense, {QUANTIZATION}": replace(in_8_bits, strategy=AllBlocks(precision=QUANTIZATION)),
    }


def measure(geometry: Geometry, device: torch.device, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Medians in seconds, errors, TFLOP/s on exact blocks, of one geometry."""
    import torch

    from diffsparse.eval.bench_planning import bench_planning

    tokens, heads = geometry.grid.num_tokens, geometry.heads
    query, key, value = random_inputs(tokens, heads, geometry.head_dim, device)
    dtype = str(query.dtype).removeprefix("torch.")

    def say_here(line: str) -> None:
        say(f"{geometry.name}: {line}")

    calls: dict[str, Callable[[], Tensor]] = dict(dense_candidates(query, key, value, say_here))
    lists = {density: random_lists(tokens, heads, density, device) for density in DENSITIES}
    densities: dict[str, float] = {}
    errors: dict[str, float] = {}
    in_pairs = random_lists(tokens, heads, DENSITY_OF_BOTH, device, (BLOCK_SIZE, KEYS_OF_PAIRS))
    kinds = [
        *((density, "", BLOCK_SIZE, lists[density]) for density in lists),
        (DENSITY_OF_BOTH, TAIL, BLOCK_SIZE, lists[DENSITY_OF_BOTH]),
        (DENSITY_OF_BOTH, PAIRS, KEYS_OF_PAIRS, in_pairs),
    ]
    for precision in PRECISIONS:
        for density, kind, keys, (key_blocks, counts) in kinds:
            blocks, tail = (BLOCK_SIZE, keys), kind == TAIL
            call = sparse_call(query, key, value, key_blocks, counts, blocks, precision=precision, tail=tail)
            name = f"{precision}{kind} {density:g}"
            if reason := _why_not(call):
                say_here(f"{name} cannot run: {reason}")
                break
            errors[name] = error_of_sampled_rows(query, key, value, key_blocks, counts, call(), tail, keys)
            if not errors[name] <= LARGEST_ERRORS[precision]:
                raise ValueError(
                    f"{name} at {geometry.name} is off by {errors[name]:.2e}, {LARGEST_ERRORS[precision]:g} is "
                    f"allowed: nothing was timed. `diffsparse doctor` tests the kernels one by one."
                )
            calls[name] = call
            densities[name] = mean_density(counts, tokens, keys)
    for peer, density, call in sparse_peers(query, key, value, lists, BLOCK_SIZE, say_here):
        name = f"{peer} {density:g}"
        error = error_of_sampled_rows(query, key, value, *lists[density], call())
        if error <= LARGEST_ERRORS["native"]:
            calls[name], densities[name], errors[name] = call, mean_density(lists[density][1], tokens), error
        else:
            say_here(f"{name} is off by {error:.1e}, {LARGEST_ERRORS['native']:.0e} is allowed: it is not timed")
    seconds = seconds_in_rounds(calls, rounds, device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best_dense = min((name for name in EXACT if name in medians), key=lambda name: medians[name])
    operations = 4 * tokens**2 * geometry.head_dim * heads
    rows = {}
    for name, median in medians.items():
        density = densities.get(name, 1.0)
        rows[name] = {
            "seconds": median,
            "spread": (max(seconds[name]) - min(seconds[name])) / median,
            "density": density,
            "tflops": operations * density / median / 1e12,
            "speed_up": medians[best_dense] / median,
        }
        if name in densities:
            rows[name]["error"] = errors[name]
            # flash-attn-4 has a dense call of its own; the others' is the one that lists all blocks.
            own = precision_of(method_of(name))
            own_dense = medians.get(own, medians.get(f"{own} 1"))
            if own_dense is not None:
                rows[name]["share_of_linear"] = own_dense / median * density
        say_here(f"{name}: {median * 1e3:.2f} ms, {rows[name]['tflops']:.0f} TFLOP/s")
    peaks = {name: extra_memory(calls[name], device) for name in calls}
    overhead = bench_planning(geometry.grid, heads, geometry.head_dim, dtype, 0.25, rounds, device)
    say_here(f"planning and permuting {overhead.share_of_dense:.1%} of dense")
    inputs = 3 * query.numel() * query.element_size()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        "tokens": tokens,
        "dtype": dtype,
        "best_dense": best_dense,
        "calls": rows,
        "extra_bytes": peaks,
        "input_bytes": inputs,
        "planning": asdict(overhead) | {"share_of_dense": overhead.share_of_dense},
    }


def method_of(name: str) -> str:
    """The name of a sparse call without the density that ends it."""
    return name.rsplit(maxsplit=1)[0]


def precision_of(method: str) -> str:
    """The precision of a method of ours, or another's as it is."""
    return method.removesuffix(TAIL).removesuffix(PAIRS)


def extra_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call takes at its peak, its output included; None where nothing counts them."""
    import torch

    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _why_not(call: Callable[[], object]) -> str | None:
    try:
        call()
    except ValueError as error:
        return str(error)
    return None

"""`diffsparse eval ablation`: what the adaptive strategy owes to its parts, on the demo model.

Each fixed rule is the adaptive strategy with a single candidate, so that all run on the same kernel, at the same
density, with the same dense steps. Videos of the same prompt and seed are compared with the dense one by PSNR.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from diffsparse.eval.demo import MODEL, PROMPTS
from diffsparse.eval.generate import Sampling, choose_device, generate, load_pipeline
from diffsparse.eval.metrics import psnr_db
from diffsparse.eval.video_io import whole_file
from diffsparse.heads import HeadClass
from diffsparse.strategies.adaptive import CANDIDATES, Adaptive, Candidate

SPATIAL_BAND, TEMPORAL_BAND, TOP_FRAME_MAJOR, TOP_TOKEN_MAJOR, TOP_TILES = CANDIDATES
RULES: dict[str, tuple[Candidate, ...]] = {
    "random blocks": (Candidate(HeadClass.TEXTURAL, "frame-major", "random"),),
    "spatial band": (SPATIAL_BAND,),
    "temporal band": (TEMPORAL_BAND,),
    "better of the two bands": (SPATIAL_BAND, TEMPORAL_BAND),
    "top pooled scores, frame-major": (TOP_FRAME_MAJOR,),
    "top pooled scores, token-major": (TOP_TOKEN_MAJOR,),
    "top pooled scores, tiles": (TOP_TILES,),
    "adaptive": CANDIDATES,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, how much of it, and where the results go."""
    parser.add_argument("--model", type=Path, default=MODEL, metavar="FOLDER", help="a pipeline with a demo.json")
    parser.add_argument("--prompts", type=int, default=8, help="how many of the demo's prompts (default: 8)")
    parser.add_argument(
        "--densities",
        type=float,
        nargs="+",
        default=[0.25, 0.125],
        metavar="D",
        help="shares of key blocks (default: 0.25 0.125)",
    )
    parser.add_argument("--dense-steps", type=float, default=0.2, metavar="SHARE", help="(default: 0.2)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--device", help="cpu, cuda, … (default: the best one here)")
    parser.add_argument("--output", type=Path, default=Path("ablation.json"), metavar="FILE", help="results so far")


def run(args: argparse.Namespace) -> int:
    """Generate what FILE does not have yet, keep it there, print the table."""
    from diffsparse import SparseAttentionConfig, disable_sparse_attention, enable_sparse_attention

    sampling = Sampling.read(args.model)
    if args.steps is not None:
        sampling = Sampling(**(vars(sampling) | {"num_inference_steps": args.steps}))
    prompts = [line for line in PROMPTS.read_text(encoding="utf-8").splitlines() if line.strip()][: args.prompts]
    results = _read(args.output, str(sampling), args.dense_steps)
    pipe = load_pipeline(args.model, choose_device(args.device))
    for prompt in prompts:
        wanted = [
            (density, rule, tail)
            for density in args.densities
            for rule in RULES
            for tail in (False, True)
            if _key(prompt, density, rule, tail) not in results["psnr_db"]
        ]
        if not wanted:
            continue
        dense = generate(pipe, prompt, 0, sampling).frames
        for density, rule, tail in wanted:
            strategy = Adaptive(density=density, candidates=RULES[rule], tail=tail)
            enable_sparse_attention(pipe, SparseAttentionConfig(strategy, dense_steps=args.dense_steps, min_tokens=0))
            sparse = generate(pipe, prompt, 0, sampling).frames
            disable_sparse_attention(pipe)
            value = statistics.mean(psnr_db(dense, sparse))
            results["psnr_db"][_key(prompt, density, rule, tail)] = value
            print(f"{value:6.2f} dB  {density:.3f}  {rule}{', tail' if tail else ''}: {prompt}", flush=True)
            with whole_file(args.output) as unfinished:
                unfinished.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(_as_markdown(results["psnr_db"], prompts, args.densities))
    return 0


def _key(prompt: str, density: float, rule: str, tail: bool) -> str:
    return f"{prompt} | {density} | {rule} | {'tail' if tail else 'no tail'}"


def _read(file: Path, sampling: str, dense_steps: float) -> dict[str, Any]:
    """Results of an earlier run with the same settings, or none.

    Raises:
        ValueError: the file is from other settings.
    """
    empty = {"sampling": sampling, "dense_steps": dense_steps, "psnr_db": {}}
    if not file.exists():
        return empty
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if (found["sampling"], found["dense_steps"]) != (sampling, dense_steps):
        raise ValueError(f"{file} holds results of other settings ({found['sampling']}). Name another --output.")
    return found


def _as_markdown(psnr_db: dict[str, float], prompts: list[str], densities: list[float]) -> str:
    lines = [
        "| mean PSNR to dense, dB: dropped / pooled tail | " + " | ".join(f"{100 * d:g} %" for d in densities) + " |",
        "|---" * (len(densities) + 1) + "|",
    ]
    for rule in RULES:
        cells = []
        for density in densities:
            means = [
                statistics.mean(psnr_db[_key(prompt, density, rule, tail)] for prompt in prompts)
                for tail in (False, True)
            ]
            cells.append(" / ".join(f"{mean:.1f}" for mean in means))
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

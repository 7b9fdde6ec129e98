"""Videos of many variants on a model's prompts, each held against the dense one: what the comparing commands share."""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffsparse.config import SparseAttentionConfig
from diffsparse.eval.demo import MODEL
from diffsparse.eval.generate import Sampling, check_seeds, choose_device, generate, load_pipeline, sparse_attention
from diffsparse.eval.lpips_metric import Lpips, NoLpips, add_lpips_arguments, lpips_for, lpips_or_reason
from diffsparse.eval.metrics import FrameScores, psnr_db, ssim
from diffsparse.eval.output_file import check_output_file
from diffsparse.eval.prompts import first_prompts, read_prompts
from diffsparse.eval.sweep_results import Pair, Score, SweepResults, Variant
from diffsparse.strategies.strategy import Strategy

Prepare = Callable[[Sampling, Callable[[], Any]], tuple[Mapping[Variant, Strategy], dict[str, Any]]]


def add_arguments(parser: argparse.ArgumentParser, prompts: int, densities: list[float]) -> None:
    """Which model, how much of it, which part of the work, and where the results go."""
    shown = " ".join(f"{density:g}" for density in densities)
    parser.add_argument("--model", type=Path, default=MODEL, metavar="FOLDER", help="a pipeline with a demo.json")
    parser.add_argument(
        "--prompts", type=int, default=prompts, metavar="N", help=f"how many of the demo's prompts (default: {prompts})"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="of the noise (default: 0)")
    parser.add_argument(
        "--densities",
        type=float,
        nargs="+",
        default=densities,
        metavar="D",
        help=f"shares of key blocks (default: {shown})",
    )
    parser.add_argument("--dense-steps", type=float, default=0.2, metavar="SHARE", help="(default: 0.2)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--device", help="cpu, cuda, … (default: the best one here)")
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="only every N-th prompt and seed, from the I-th: commands with 1/N to N/N share the work",
    )
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="FILE", help="make no video; join these results into one table"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="results so far, which the next run goes on with; with --merge, the joined ones",
    )
    add_lpips_arguments(parser)


def prepared(args: argparse.Namespace) -> tuple[Sampling, str, Callable[[], Any]]:
    """How the model is called, on which device, and what loads it at its first call.

    Raises:
        ValueError: an argument that makes no sense.
    """
    for density in args.densities:
        if not 0 < density <= 1:
            raise ValueError(f"--densities must be above 0 and at most 1, got {density:g}. For 25 % say 0.25.")
    if not 0 <= args.dense_steps <= 1:
        raise ValueError(f"--dense-steps must be a share from 0 to 1, got {args.dense_steps:g}. For 20 % say 0.2.")
    check_seeds("--seeds", args.seeds)
    check_output_file("--output", args.output)
    sampling, device = Sampling.read(args.model, args.steps), choose_device(args.device)
    return sampling, device, functools.cache(lambda: load_pipeline(args.model, device))


def carry_out(args: argparse.Namespace, name: str, prepare: Prepare) -> SweepResults | None:
    """Make what the file of results does not have yet; or join files into one. None for a shard, which is no table.

    Args:
        args: of the command, whose `name` the file has where the user names none.
        name: of the command.
        prepare: from the sampling and what loads the pipeline, the strategy of every variant, in order, and what else
            the results depend on.

    Raises:
        ValueError: results of other settings.
    """
    if args.merge:
        check_output_file("--output", args.output)
        results = SweepResults.merged(args.merge)
        if args.output is not None:
            results.write(args.output)
        return results
    sampling, device, load = prepared(args)
    # A shard has a file of its own, or two would overwrite each other.
    shard = "" if args.shard is None else f"-{args.shard[0]}-of-{args.shard[1]}"
    file = args.output or Path(f"{name}{shard}.json")
    lpips = lpips_or_reason(args.lpips_net, args.lpips_backbone, device)
    lpips = lpips_for(lpips, sampling.height, sampling.width)
    if file.exists() and "lpips_net" not in SweepResults.read(file).settings:
        lpips = NoLpips(lpips.net, f"n/a: {file} began without it, and goes on so")
    strategies, others = prepare(sampling, load)
    settings = {
        "model": str(args.model.name),
        "sampling": str(sampling),
        "dense_steps": args.dense_steps,
        # A GPU computes in another precision.
        "device": device.partition(":")[0],
    }
    if isinstance(lpips, NoLpips):
        print(f"LPIPS {lpips.reason}.")
    else:
        settings["lpips_net"] = lpips.net
    results = SweepResults.going_on(file, settings | others)
    _make_videos(args, load, sampling, strategies, lpips, results, file)
    if args.shard is None:
        return results
    print(f"{file} has {len(results.scores)} videos. When all shards are done, join their files by --merge.")
    return None


def _make_videos(
    args: argparse.Namespace,
    load: Callable[[], Any],
    sampling: Sampling,
    strategies: Mapping[Variant, Strategy],
    lpips: Lpips | NoLpips,
    results: SweepResults,
    file: Path,
) -> None:
    """Make what is missing, all variants of a prompt before the next; write the file after each video."""
    first, every = args.shard or (1, 1)
    for pair in pairs_of(args)[first - 1 :: every]:
        wanted = [variant for variant in strategies if (pair, variant) not in results.scores]
        if not wanted:
            continue
        pipe = load()
        dense = generate(pipe, pair.prompt, pair.seed, sampling)
        for variant in wanted:
            config = SparseAttentionConfig(strategies[variant], dense_steps=args.dense_steps, min_tokens=0)
            with sparse_attention(pipe, config) as report:
                sparse = generate(pipe, pair.prompt, pair.seed, sampling)
                density = report().density
            videos = dense.frames, sparse.frames
            score = results.scores[pair, variant] = Score(
                psnr_db=FrameScores(tuple(psnr_db(*videos)), higher_is_better=True).mean,
                ssim=FrameScores(tuple(ssim(*videos)), higher_is_better=True).mean,
                density=density,
                seconds=sum(sparse.step_seconds),
                dense_seconds=sum(dense.step_seconds),
                lpips=None if isinstance(lpips, NoLpips) else statistics.fmean(lpips(*videos)),
            )
            results.add_to(file)
            print(f"{score.psnr_db:6.2f} dB  {variant}: {pair.prompt}, seed {pair.seed}", flush=True)


def pairs_of(args: argparse.Namespace) -> list[Pair]:
    """Every prompt with every seed, prompt by prompt, whatever the shard.

    Raises:
        ValueError: more prompts than there are, or none.
    """
    prompts = first_prompts(read_prompts("demo"), args.prompts, "--prompts")
    return [Pair(prompt, seed) for prompt in prompts for seed in args.seeds]


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, like 3/8, got {text!r}")
    return int(index), int(count)

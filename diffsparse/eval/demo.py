"""`diffsparse demo`: one prompt, dense and sparse, with the embedded model; how much faster, and how close."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsparse.config import MIN_TOKENS, PRESETS, SparseAttentionConfig, as_config
from diffsparse.eval.comparison import Comparison, compare
from diffsparse.eval.environment import devices, versions
from diffsparse.eval.generate import (
    Generation,
    Sampling,
    check_seeds,
    choose_device,
    generate,
    load_pipeline,
    sparse_attention,
)
from diffsparse.eval.head_picture import draw_head_classes
from diffsparse.eval.lpips_metric import add_lpips_arguments, lpips_or_reason
from diffsparse.eval.output_file import make_writable, write_json
from diffsparse.eval.prompts import prompt_or_first
from diffsparse.eval.side_by_side import side_by_side
from diffsparse.eval.video_io import ffmpeg, write_video

if TYPE_CHECKING:
    from rich.console import Console

    from diffsparse.report import SparseAttentionReport

MODEL = Path(__file__).parent.parent / "assets" / "demo"


@dataclass(frozen=True, eq=False)
class Demo:
    """Both videos, and all that is known of them."""

    prompt: str
    config: SparseAttentionConfig
    sampling: Sampling
    dense: Generation
    sparse: Generation
    comparison: Comparison
    attention: SparseAttentionReport
    load_seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to generate, how, and where to put it."""
    parser.add_argument(
        "--prompt",
        help="what to show; the embedded model has seen a few shapes, patterns, colours and motions only, such as "
        "“a yellow star turns over a purple striped background” (default: the first of its own prompts)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="balanced", help="how sparse (default: balanced)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, … (default: the best one here)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("diffsparse-demo"),
        metavar="FOLDER",
        help="where videos, picture and report go (default: diffsparse-demo)",
    )
    parser.add_argument("--model", type=Path, default=MODEL, metavar="FOLDER", help="another pipeline with a demo.json")
    add_lpips_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Generate twice, compare, write, print. What is wrong with the arguments is found before generating."""
    from rich.console import Console

    console = Console(highlight=False)
    check_seeds("--seed", [args.seed])
    sampling = Sampling.read(args.model, args.steps)
    prompt = prompt_or_first(args.prompt)
    device = choose_device(args.device)
    lpips = lpips_or_reason(args.lpips_net, args.lpips_backbone)
    make_writable(args.output)
    ffmpeg()

    started = time.perf_counter()
    pipe = load_pipeline(args.model, device)
    load_seconds = time.perf_counter() - started
    console.print(
        f"“{prompt}”, seed {args.seed}: {sampling.width} × {sampling.height}, "
        f"{sampling.num_inference_steps} steps on {device}; model loaded in {load_seconds:.1f} s",
        markup=False,
    )
    _warn_of_cut_prompt(pipe, prompt, sampling, console)
    config = as_config(args.preset)
    if config.min_tokens is None:
        # A GPU would find so short a sequence as fast dense.
        config = dataclasses.replace(config, min_tokens=MIN_TOKENS)
    dense, sparse, attention = _generate_both(pipe, prompt, args.seed, sampling, config, console)
    comparison = compare([(dense.frames, sparse.frames)], lpips)
    demo = Demo(prompt, config, sampling, dense, sparse, comparison, attention, load_seconds)
    _write(demo, args, device)
    _print(demo, args, console)
    return 0


def _warn_of_cut_prompt(pipe: Any, prompt: str, sampling: Sampling, console: Console) -> None:
    num_tokens = len(pipe.tokenizer(prompt).input_ids)
    limit = sampling.max_sequence_length
    if limit is not None and num_tokens > limit:
        console.print(f"The prompt has {num_tokens} tokens; the model reads only the first {limit}.")


def _generate_both(
    pipe: Any, prompt: str, seed: int, sampling: Sampling, config: SparseAttentionConfig, console: Console
) -> tuple[Generation, Generation, SparseAttentionReport]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        # First calls are slower: memory is fetched, kernels are compiled. One step each way, outside the timing.
        warm_up = progress.add_task("warm-up", total=2)
        one_step = dataclasses.replace(sampling, num_inference_steps=1)
        dense_task = progress.add_task("dense", total=sampling.num_inference_steps, start=False)
        sparse_task = progress.add_task("sparse", total=sampling.num_inference_steps, start=False)

        def timed(task: Any) -> Generation:
            progress.start_task(task)
            made = generate(pipe, prompt, seed, sampling, on_step=lambda: progress.advance(task))
            progress.stop_task(task)
            return made

        generate(pipe, prompt, seed, one_step, on_step=lambda: progress.advance(warm_up))
        with sparse_attention(pipe, dataclasses.replace(config, dense_steps=0.0)):
            generate(pipe, prompt, seed, one_step, on_step=lambda: progress.advance(warm_up))

        dense = timed(dense_task)
        with sparse_attention(pipe, config) as report:
            return dense, timed(sparse_task), report()


def _write(demo: Demo, args: argparse.Namespace, device: str) -> None:
    folder: Path = args.output
    fps = demo.sampling.fps
    picture, report = folder / "head_classes.png", folder / "report.json"
    # An earlier run's must not stand beside these videos.
    for stale in (picture, report):
        stale.unlink(missing_ok=True)
    write_video(folder / "dense.mp4", demo.dense.frames, fps)
    write_video(folder / "sparse.mp4", demo.sparse.frames, fps)
    titles = f"dense  {demo.dense.total_seconds:.1f} s", f"sparse  {demo.sparse.total_seconds:.1f} s"
    subtitles = "all of the attention", _in_short(demo)
    pair = side_by_side(demo.dense.frames, demo.sparse.frames, titles, subtitles, heading=demo.prompt)
    write_video(folder / "side_by_side.mp4", pair, fps)
    if demo.attention.density is not None:
        draw_head_classes(demo.attention, picture)
    write_json(report, _as_dict(demo, args, device))


def _in_short(demo: Demo) -> str:
    # With the dense steps in it, as the time is.
    density = demo.attention.overall_density if demo.attention.density is not None else None
    ran = "sparse attention never ran" if density is None else f"{100 * density:.0f} % of the attention"
    return f"{ran}, {demo.dense.total_seconds / demo.sparse.total_seconds:.2f}× the speed"


def _as_dict(demo: Demo, args: argparse.Namespace, device: str) -> dict[str, Any]:
    command = ["diffsparse", "demo", "--prompt", demo.prompt, "--seed", str(args.seed), "--preset", args.preset]
    command += ["--steps", str(demo.sampling.num_inference_steps), "--device", device]
    if args.model != MODEL:
        command += ["--model", str(args.model)]
    return {
        "command": shlex.join(command),
        "prompt": demo.prompt,
        "seed": args.seed,
        "preset": args.preset,
        "config": repr(demo.config),
        "sampling": dataclasses.asdict(demo.sampling),
        "device": device,
        "machine": devices(),
        "versions": versions(),
        "load_seconds": demo.load_seconds,
        "dense": demo.dense.times(),
        "sparse": demo.sparse.times(),
        "speed_up": {
            "steps": demo.dense.seconds_per_step / demo.sparse.seconds_per_step,
            "total": demo.dense.total_seconds / demo.sparse.total_seconds,
        },
        "quality": demo.comparison.as_dict(),
        "attention": demo.attention.as_dict(),
    }


def _print(demo: Demo, args: argparse.Namespace, console: Console) -> None:
    from diffsparse.eval.demo_tables import attention_table, quality_table, time_table

    console.print(time_table(demo.dense, demo.sparse))
    console.print(quality_table(demo.comparison))
    console.print(attention_table(demo.attention))
    notes = demo.comparison.notes()
    if demo.attention.density is None:
        notes.append("Sparse attention never ran: the reasons are in the table.")
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(f"Look at {args.output / 'side_by_side.mp4'}; the rest is beside it.", markup=False, soft_wrap=True)

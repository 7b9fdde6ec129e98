"""`diffsparse calibrate`: what a strategy plans on a few prompts, as a file that any run can use."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from diffsparse.config import PLAN_FILE_SUFFIX, SparseAttentionConfig
from diffsparse.eval.generate import check_seeds, choose_device, generate, sparse_attention
from diffsparse.eval.model_choice import add_model_arguments, choose_model
from diffsparse.eval.named_config import read_config
from diffsparse.eval.output_file import make_writable
from diffsparse.eval.prompts import first_prompts, read_prompts
from diffsparse.plan_recorder import PlanRecorder

OUTPUT = Path("plan.safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """By which strategy, on which model and prompts, and where the file goes."""
    add_model_arguments(parser)
    parser.add_argument("--prompts", type=int, default=3, metavar="N", help="how many prompts (default: 3)")
    parser.add_argument(
        "--prompt-file",
        metavar="SET|FILE",
        help="demo or general, or a text, CSV (column prompt) or JSONL (key prompt) file, of which the first N are "
        "taken (default: demo for models with a demo.json, else general)",
    )
    parser.add_argument(
        "--strategy",
        default="balanced",
        metavar="NAME:OPTIONS",
        help="a preset or a strategy, with options: sparsed:density=0.2,dense_steps=0.1 (default: balanced)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, metavar="FILE", help=f"where the plans go (default: {OUTPUT})"
    )


def run(args: argparse.Namespace) -> int:
    """Make the videos, and after each one write the file anew. What is wrong is found before the first."""
    from rich.console import Console

    from diffsparse.eval.run_progress import RunProgress

    console = Console(highlight=False)
    config = read_config(args.strategy, "--strategy")
    model = choose_model(args.model, args.size, args.frames, args.steps)
    default_set = "demo" if model.knows_its_sampling else "general"
    prompts = read_prompts(default_set if args.prompt_file is None else args.prompt_file, "--prompt-file")
    prompts = first_prompts(prompts, args.prompts, "--prompts")
    check_seeds("--seed", [args.seed])
    output: Path = args.output
    if output.suffix != PLAN_FILE_SUFFIX or output.is_dir():
        raise ValueError(f"--output must be a file that ends in {PLAN_FILE_SUFFIX}, got {output}.")
    device = choose_device(args.device)
    make_writable(output.parent)

    recorder = PlanRecorder(config.strategy)
    pipe = model.load(device, args.offload)
    # Nothing is timed: the plans are for other machines as well.
    recording = dataclasses.replace(config, strategy=recorder, min_tokens=config.fewest_tokens)
    num_steps = model.sampling.num_inference_steps
    try:
        with sparse_attention(pipe, recording), RunProgress(console, len(prompts), num_steps) as progress:
            for prompt in prompts:
                progress.start(f"prompt {recorder.num_prompts + 1}")
                made = generate(pipe, prompt, args.seed, model.sampling, progress.step)
                recorder.end_prompt()
                _save(args, recorder, config)
                progress.end(f"“{prompt}”", f"{made.total_seconds:.1f} s")
    except KeyboardInterrupt:
        if recorder.num_prompts:
            console.print(
                f"{output} has the plans of the first {recorder.num_prompts} of {len(prompts)} prompts.", markup=False
            )
        raise
    console.print(
        f"{output}: {output.stat().st_size / 1e3:,.0f} kB. "
        f'Use it: pipe.enable_sparse_attention("{output}"), for this model and size.',
        markup=False,
        soft_wrap=True,
    )
    return 0


def _save(args: argparse.Namespace, recorder: PlanRecorder, config: SparseAttentionConfig) -> None:
    try:
        recorder.save(args.output, config)
    except ValueError as error:
        raise ValueError(
            f"--strategy {args.strategy} leaves nothing to write: {error}. Short videos are dense unless min_tokens=0 "
            f"is among its options, and so are the first dense_steps."
        ) from error

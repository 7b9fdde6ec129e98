"""`diffsparse inspect`: what each attention head keeps, step by step, as a page, pictures and numbers.

Not called inspect.py: a script started in this folder would import it in place of Python's own `inspect`.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

from diffsparse.config import SparseAttentionConfig
from diffsparse.eval.environment import devices, versions
from diffsparse.eval.generate import check_seeds, choose_device, generate, sparse_attention
from diffsparse.eval.inspect_data import collect
from diffsparse.eval.inspect_measures import SAMPLED_ROWS
from diffsparse.eval.inspect_page import as_page, head_name, in_words, percent
from diffsparse.eval.inspect_pictures import draw_heads, draw_maps
from diffsparse.eval.inspect_watch import Watch, watching
from diffsparse.eval.model_choice import add_model_arguments, choose_model
from diffsparse.eval.named_config import read_config
from diffsparse.eval.output_file import make_writable, write_json
from diffsparse.eval.prompts import prompt_or_first
from diffsparse.whole_file import whole_file

OUTPUT = Path("diffsparse-inspect")
PAGE, NUMBERS, HEADS = "inspect.html", "inspect.json", "heads.png"
AT_STEPS = ("0.2", "0.5", "0.9")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, prompt and config, what to draw, and where it goes."""
    add_model_arguments(parser)
    parser.add_argument("--prompt", help="what to show (default: the first of the embedded model's prompts)")
    parser.add_argument(
        "--config",
        default="balanced",
        metavar="NAME:OPTIONS",
        help="a preset, a strategy with options, adaptive:density=0.2,dense_steps=0.1, or a plan file "
        "(default: balanced)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument(
        "--at-steps",
        nargs="+",
        default=list(AT_STEPS),
        metavar="STEP",
        help="steps whose attention maps are drawn: a fraction of the steps with a point in it, or a number, 0 first "
        f"(default: {' '.join(AT_STEPS)})",
    )
    parser.add_argument(
        "--heads",
        nargs="+",
        metavar="LAYER:HEAD",
        help="heads whose attention maps are drawn (default: of each class those with the largest and "
        "the smallest error)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        metavar="FOLDER",
        help=f"where page, pictures and numbers go (default: {OUTPUT})",
    )


def run(args: argparse.Namespace) -> int:
    """Make one video and watch it. What is wrong is found before that, and nothing is written before it is done."""
    from rich.console import Console

    from diffsparse.eval.run_progress import RunProgress

    console = Console(highlight=False)
    config = read_config(args.config)
    model = choose_model(args.model, args.size, args.frames, args.steps)
    prompt = prompt_or_first(args.prompt)
    check_seeds("--seed", [args.seed])
    num_steps = model.sampling.num_inference_steps
    watch = Watch(_steps(args.at_steps, num_steps), None if args.heads is None else _heads(args.heads))
    device = choose_device(args.device)
    make_writable(args.output)

    # Nothing is timed: sparse attention is looked at whether or not it is faster here.
    config = dataclasses.replace(config, min_tokens=config.fewest_tokens)
    pipe = model.load(device, args.offload)
    _check_fit(pipe, config, watch)
    with RunProgress(console, 1, num_steps) as progress, watching(pipe, config, watch) as end_step:
        progress.start("watching")

        def on_step() -> None:
            end_step()
            progress.step()

        made = generate(pipe, prompt, args.seed, model.sampling, on_step)
        progress.end(f"“{prompt}”", f"{made.total_seconds:.1f} s, measuring included")
    facts = {
        "command": _command(args, prompt),
        "model": args.model,
        "prompt": prompt,
        "seed": args.seed,
        "config": args.config.strip(),
        "config_in_full": repr(config),
        "sampling": dataclasses.asdict(model.sampling),
        "sampled_rows": SAMPLED_ROWS,
        "seconds": made.total_seconds,
        "device": device,
        "machine": devices(),
        "versions": versions(),
    }
    data = facts | collect(watch, num_steps)
    _write(data, watch, args.output)
    _print(data, args.output, console)
    return 0


def _steps(texts: list[str], num_steps: int) -> tuple[int, ...]:
    """The steps that fractions and numbers name, in order."""
    steps = set()
    for text in texts:
        number = re.fullmatch(r"(\d+)|(\d*\.\d*)", text)
        if number is None or text == ".":
            raise ValueError(
                f"--at-steps {text}: expected a step such as 7, or a fraction of the steps such as 0.5 with a point."
            )
        if number[2] and float(text) > 1:
            raise ValueError(f"--at-steps {text}: a fraction is from 0.0 to 1.0; for a step leave the point out.")
        # 0.29 of 100 is 28.999…
        step = min(int(round(float(text) * num_steps, 6)), num_steps - 1) if number[2] else int(text)
        if step >= num_steps:
            raise ValueError(f"--at-steps {text}: with {num_steps} steps the last one is {num_steps - 1}.")
        steps.add(step)
    return tuple(sorted(steps))


def _heads(texts: list[str]) -> tuple[tuple[int, int], ...]:
    heads = []
    for text in texts:
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None:
            raise ValueError(f"--heads {text}: expected LAYER:HEAD, two numbers counted from 0, such as 3:1.")
        heads.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(heads))


def _check_fit(pipe: Any, config: SparseAttentionConfig, watch: Watch) -> None:
    """Raise ValueError where the config is not for this pipeline, or it has not the heads to be drawn."""
    # With its own strategy, which may be for one model only; watched, it would say so at its first plan.
    with sparse_attention(pipe, config) as report:
        transformers = report().transformers
    for transformer in transformers:
        # What the model's own config says. Where it does not, the first attention call does.
        num_heads = getattr(getattr(pipe, transformer.name).config, "num_attention_heads", None)
        for layer, head in watch.map_heads or ():
            if layer >= transformer.num_layers or (isinstance(num_heads, int) and head >= num_heads):
                has = "" if num_heads is None else f" with heads 0 to {num_heads - 1} each"
                raise ValueError(
                    f"--heads {layer}:{head}: {transformer.name} has layers 0 to {transformer.num_layers - 1}{has}."
                )


def _command(args: argparse.Namespace, prompt: str) -> str:
    words = ["diffsparse", "inspect", "--model", args.model, "--prompt", prompt, "--config", args.config]
    words += ["--seed", str(args.seed)]
    for option in ("steps", "size", "frames", "device"):
        if getattr(args, option) is not None:
            words += [f"--{option}", str(getattr(args, option))]
    words += ["--at-steps", *args.at_steps]
    words += [] if args.heads is None else ["--heads", *args.heads]
    return shlex.join(words + ["--offload"] * args.offload)


def _write(data: dict[str, Any], watch: Watch, folder: Path) -> None:
    """The page last, so that it never shows what is not there; an earlier run's goes first."""
    for stale in (folder / PAGE, folder / NUMBERS, folder / HEADS, *folder.glob("map_*_layer*_head*_step*.png")):
        stale.unlink(missing_ok=True)
    pictures = {}
    for shown, key in zip(data["maps"], sorted(watch.maps)):
        file = folder / shown["file"]
        title = f"{head_name(data, shown)}, step {shown['step']}: {in_words(shown)}"
        draw_maps(watch.maps[key], title, file)
        pictures[shown["file"]] = file.read_bytes()
    if any(transformer["num_heads"] for transformer in data["transformers"]):
        draw_heads(data, folder / HEADS)
    write_json(folder / NUMBERS, data)
    with whole_file(folder / PAGE) as unfinished:
        # A plan file's name may have bytes that are no UTF-8.
        unfinished.write_text(as_page(data, pictures), "utf-8", "backslashreplace")


def _print(data: dict[str, Any], folder: Path, console: Any) -> None:
    summary = data["summary"]
    if summary["density"] is None:
        reasons = {reason for transformer in data["transformers"] for reason in transformer["dense_reasons"]}
        console.print(f"Sparse attention never ran: {'; '.join(sorted(reasons))}.", markup=False, soft_wrap=True)
    else:
        worst = summary["worst_head"]
        console.print(
            f"density {percent(summary['density'])} of the sparse calls, {percent(summary['overall_density'])} of all; "
            f"recall {percent(summary['recall'])} (5th percentile {percent(summary['recall_5th_percentile'])}); "
            f"output error {percent(summary['error'])}, largest in {head_name(data, worst)}: {percent(worst['error'])}",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"Open {folder / PAGE}; pictures and {NUMBERS} lie beside it.", markup=False, soft_wrap=True)

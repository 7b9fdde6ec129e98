"""`diffsparse eval run`: videos of the same prompts and seeds, densely and by each config, in a folder."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from diffsparse.eval.config_file import config_texts
from diffsparse.eval.environment import environment
from diffsparse.eval.generate import check_seeds, choose_device
from diffsparse.eval.model_choice import add_model_arguments, choose_model
from diffsparse.eval.named_config import DENSE
from diffsparse.eval.output_file import make_writable
from diffsparse.eval.prompts import first_prompts, read_prompts
from diffsparse.eval.protocol import PROTOCOLS, choose_protocol
from diffsparse.eval.run_config import read_run_configs
from diffsparse.eval.run_folder import RunFolder
from diffsparse.eval.run_videos import Job, Studio, make_videos


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is generated, how, on what, and where it goes."""
    add_model_arguments(parser)
    parser.add_argument(
        "--prompts",
        metavar="SET|FILE",
        help="demo or general, or a text, CSV (column prompt) or JSONL (key prompt) file "
        "(default: demo for models with a demo.json, else general)",
    )
    parser.add_argument("--num-prompts", type=int, metavar="N", help="only the first N prompts (default: all)")
    parser.add_argument(
        "--config",
        nargs="+",
        default=["balanced"],
        metavar="CONFIG",
        help="presets or strategies, with options: fast adaptive:density=0.2,dense_steps=0.1; a plan file; "
        "a YAML file with a list of these (default: balanced)",
    )
    parser.add_argument(
        "--baseline",
        nargs="+",
        default=[DENSE],
        metavar="BASELINE",
        help="what else to hold them against: attention backends and caches of diffusers, as backend:sage or "
        "firstblockcache:threshold=0.1; dense videos are always made",
    )
    parser.add_argument(
        "--protocol",
        choices=["scope"],
        help="size, frames, dense steps and dense layer as the SCOPE paper has them for Wan and HunyuanVideo, and its "
        "numbers in the report",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="of the noise (default: 0)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("diffsparse-eval"),
        metavar="FOLDER",
        help="where all goes; what is there already is not made again (default: diffsparse-eval)",
    )


def run(args: argparse.Namespace) -> int:
    """Make what the folder lacks. What is wrong with the arguments is found before anything is generated."""
    from rich.console import Console

    from diffsparse.eval.run_progress import RunProgress

    console = Console(highlight=False)
    job = read_job(args)
    make_writable(args.output)
    folder = RunFolder(args.output)
    folder.check(_settings(job))
    num_missing = job.num_missing(folder)
    _check_room(folder.path, num_missing, job.model.sampling.largest_video_bytes)
    sampling = job.model.sampling
    configs = ", ".join(config.text for config in job.configs)
    console.print(
        f"{job.num_videos} videos: {len(job.prompts)} prompts, {len(job.seeds)} seeds, dense and {configs}; "
        f"{sampling.width} × {sampling.height}, {sampling.num_frames} frames, {sampling.num_inference_steps} steps "
        f"on {job.device}",
        markup=False,
        soft_wrap=True,
    )
    studio = Studio(job)
    if num_missing:
        studio.open()
    # Only now: a config that the model cannot have would be missing for ever.
    folder.agree(_settings(job), {"command": _command(args, job)} | environment(job.device))
    with RunProgress(console, job.num_videos, sampling.num_inference_steps) as progress:
        num_failed = make_videos(job, folder, studio, progress)
    if num_failed:
        console.print(f"{num_failed} of {job.num_videos} videos could not be made. The same command tries them again.")
        return 1
    console.print(f"All is there. Look at it: diffsparse eval report {shlex.quote(str(args.output))}", markup=False)
    return 0


def read_job(args: argparse.Namespace) -> Job:
    """What the arguments ask for.

    Raises:
        ValueError: they cannot be followed.
    """
    size, frames, fixed = args.size, args.frames, {}
    protocol = None if args.protocol is None else choose_protocol(args.model)
    if protocol is not None:
        follows = PROTOCOLS[protocol]
        size = follows.agreed("--size", follows.size, size)
        frames = follows.agreed("--frames", follows.frames, frames)
        fixed = dict(follows.sparse)
    model = choose_model(args.model, size, frames, args.steps)
    default_set = "demo" if model.knows_its_sampling else "general"
    prompts = read_prompts(default_set if args.prompts is None else args.prompts)
    if args.num_prompts is not None:
        prompts = first_prompts(prompts, args.num_prompts, "--num-prompts")
    check_seeds("--seeds", args.seeds)
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds must differ, got {args.seeds}.")
    rank, num_ranks = _from_launcher("RANK", least=0), _from_launcher("WORLD_SIZE", least=1)
    num_pairs = len(prompts) * len(args.seeds)
    baselines = [name for name in args.baseline if name != DENSE]
    return Job(
        model=model,
        prompts=prompts,
        seeds=args.seeds,
        configs=read_run_configs(config_texts(args.config), fixed, baselines),
        device=_device(args.device),
        offload=args.offload,
        protocol=protocol,
        start=rank * num_pairs // num_ranks,
    )


def _device(name: str | None) -> str:
    """As asked for; else each process that a launcher started on this machine takes a GPU of its own."""
    import torch

    device = choose_device(name)
    count = torch.cuda.device_count()
    return f"cuda:{_from_launcher('LOCAL_RANK', least=0) % count}" if name is None and device == "cuda" else device


def _from_launcher(variable: str, least: int) -> int:
    """A number that a launcher says in the environment; the least one without a launcher."""
    text = os.environ.get(variable, str(least))
    if not text.isdecimal() or int(text) < least:
        raise ValueError(
            f"{variable} in the environment must be a number from {least} on, as launchers set it, got {text!r}. "
            f"Unset it, or start the command by torchrun or accelerate."
        )
    return int(text)


def _settings(job: Job) -> dict[str, Any]:
    return {
        "model": job.model.name,
        "model_sha256": job.model.fingerprint,
        "sampling": vars(job.model.sampling),
        "prompts": job.prompts,
        "seeds": sorted(job.seeds),
        "protocol": job.protocol,
        "configs": {
            config.folder: {
                "text": config.text,
                "kind": config.kind,
                "config": " + ".join(map(repr, config.parts)),
            }
            for config in job.configs
        },
    }


def _command(args: argparse.Namespace, job: Job) -> str:
    sampling = job.model.sampling
    words = ["diffsparse", "eval", "run", "--model", args.model]
    words += ["--prompts", args.prompts] if args.prompts else []
    words += ["--num-prompts", str(args.num_prompts)] if args.num_prompts else []
    words += ["--baseline", *args.baseline] if args.baseline != [DENSE] else []
    words += ["--config", *args.config, "--seeds", *map(str, args.seeds), "--steps", str(sampling.num_inference_steps)]
    words += ["--size", f"{sampling.width}x{sampling.height}", "--frames", str(sampling.num_frames)]
    words += ["--device", args.device] if args.device else []
    words += ["--offload"] if args.offload else []
    words += ["--protocol", args.protocol] if args.protocol else []
    return shlex.join([*words, "--output", str(args.output)])


def _check_room(folder: Path, num_videos: int, bytes_a_video: int) -> None:
    """Find out now whether the disk can hold all the videos."""
    if (needed := num_videos * bytes_a_video) > (free := shutil.disk_usage(folder).free):
        raise ValueError(
            f"--output {folder}: {num_videos} videos may need {needed / 1e6:,.1f} MB, the disk has "
            f"{free / 1e6:,.1f} MB free. Make room, or name another folder."
        )

"""`diffsparse plan`: what sparse attention is expected to save, without weights, GPU or network."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, how large a video, and what is known of the machine."""
    parser.add_argument(
        "--family",
        default="wan",
        help="a published model: wan (2.1 14B, the default), wan-1.3b, "
        "hunyuan_video, cogvideox (1.5 5B), ltx, flux (FLUX.1), qwen_image",
    )
    parser.add_argument("--size", default="1280x720", metavar="WxH", help="pixels (default: %(default)s)")
    parser.add_argument("--frames", type=int, help="frames of the video (default: 81, of an image 1)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    parser.add_argument(
        "--config", default="balanced", help="preset, or STRATEGY:OPTION=VALUE,… (default: %(default)s)"
    )
    parser.add_argument(
        "--density", type=float, help="share of key blocks that sparse calls compute (default: the config's)"
    )
    parser.add_argument("--gpu", metavar="NAME", help="GPU whose measured speed is taken, H200 (default: the one here)")
    parser.add_argument(
        "--efficiency",
        type=float,
        metavar="X",
        help="speed-up of the sparse kernel over dense attention times the density, if known better",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")


def run(args: argparse.Namespace) -> int:
    """Print the prediction."""
    from diffsparse.eval.model_choice import read_size
    from diffsparse.eval.named_config import read_config
    from diffsparse.eval.output_file import check_output_file, write_json
    from diffsparse.predict import predict_sparse_attention
    from diffsparse.published_models import CALLS, published_transformer

    size = read_size(args.size)
    if args.steps < 1:
        raise ValueError(f"`--steps` must be at least 1, got {args.steps}.")
    check_output_file("`--json`", args.json)
    transformer = published_transformer(args.family)
    frames = args.frames
    if frames is None:
        frames = 81 if CALLS[type(transformer).__name__].frames else 1
    prediction = predict_sparse_attention(
        transformer,
        **size,
        num_frames=frames,
        num_inference_steps=args.steps,
        config=read_config(args.config),
        density=args.density,
        gpu=args.gpu,
        efficiency=args.efficiency,
    )
    print(prediction)
    if args.json is not None:
        write_json(args.json, prediction.as_dict())
    return 0

"""Trains the embedded demo pipeline: `python -m diffsparse.eval.train_demo --output DIR --minutes 90 --seed 0`.

Can be interrupted and started again with the same arguments. `DIR/pipeline` is the result; `--export-only` writes it
from the newest checkpoint, also while a training run is under way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from diffsparse.eval.demo_tokenizer import build_tokenizer
from diffsparse.eval.generate import choose_device
from diffsparse.eval.prompts import read_prompts
from diffsparse.eval.train_demo_export import contact_sheet, export_pipeline, write_model_card
from diffsparse.eval.train_demo_latents import fit_demo_vae
from diffsparse.eval.train_demo_transformer import (
    GPU_BATCH_SCALE,
    GPU_PHASES,
    PHASES,
    Recipe,
    TextToLatents,
    build_model,
    train_transformer,
)
from diffsparse.eval.training_run import TrainingRun

NOTES = "Read the contact sheet: colours, textures, backgrounds and directions should follow the caption."


def train(
    output: Path,
    minutes: float,
    seed: int,
    recipe: Recipe | None = None,
    *,
    steps: int | None = None,
    device: torch.device | str = "cpu",
    batch_scale: int = 1,
) -> tuple[AutoencoderKLWan, TextToLatents, PreTrainedTokenizerFast]:
    """Train, or go on training, for `minutes` or `steps` in all, whichever ends first; gives the averaged models."""
    recipe = recipe or Recipe()
    vae, model, tokenizer = build(output, recipe, seed)
    vae.to(device)
    model.to(device)
    run = TrainingRun(output, "transformer", 60 * minutes, steps)
    train_transformer(model, tokenizer, vae, run, seed, phases=recipe.phases, batch_scale=batch_scale)
    return vae.cpu(), model.cpu(), tokenizer


def load(
    output: Path, seed: int, recipe: Recipe | None = None
) -> tuple[AutoencoderKLWan, TextToLatents, PreTrainedTokenizerFast]:
    """The averaged models of the newest checkpoint in `output`."""
    saved = TrainingRun(output, "transformer", 0).resume()
    if saved is None:
        raise FileNotFoundError(f"{output} holds no checkpoint, transformer.pt: train first.")
    vae, model, tokenizer = build(output, recipe or Recipe(), seed)
    model.load_state_dict(saved["average"])
    return vae, model, tokenizer


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="checkpoints, log.jsonl and pipeline/ go here")
    parser.add_argument("--minutes", type=float, default=90.0, help="time budget, interruptions not counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--batch-scale", type=int, help=f"times the clips a step; {GPU_BATCH_SCALE} if not given on a GPU, else 1"
    )
    parser.add_argument("--export-only", action="store_true", help="export the newest checkpoint, do not train")
    parser.add_argument("--pipeline", type=Path, help="where to export to; OUTPUT/pipeline if not given")
    parser.add_argument("--samples", type=int, default=6, help="prompts on the contact sheet")
    parser.add_argument("--notes", default=NOTES, help="what comes out, for the model card")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    on_gpu = device.startswith("cuda")
    batch_scale = arguments.batch_scale or (GPU_BATCH_SCALE if on_gpu else 1)
    if not arguments.export_only:
        if on_gpu:
            torch.set_float32_matmul_precision("high")
        recipe = Recipe(phases=GPU_PHASES if on_gpu else PHASES)
        minutes, seed = arguments.minutes, arguments.seed
        train(arguments.output, minutes, seed, recipe, device=device, batch_scale=batch_scale)
    parts = load(arguments.output, arguments.seed)
    folder = arguments.pipeline or arguments.output / "pipeline"
    grid = PHASES[-1].grid
    pipe = export_pipeline(folder, *parts, grid)
    if arguments.samples > 0:
        prompts = read_prompts("demo")[: arguments.samples]
        contact_sheet(pipe.to(device), prompts, folder / "samples.png", grid)
        log = arguments.output / "log.jsonl"
        write_model_card(
            folder,
            log,
            options=f"--minutes {arguments.minutes:g} --seed {arguments.seed} --device {device} "
            f"--batch-scale {batch_scale}",
            prompts=prompts,
            notes=arguments.notes,
        )


def build(output: Path, recipe: Recipe, seed: int) -> tuple[AutoencoderKLWan, TextToLatents, PreTrainedTokenizerFast]:
    """The untrained models. Autoencoder and tokenizer are fitted once and kept in `output`.

    A transformer fits no other autoencoder: on another machine, the signs of the principal components may be others.
    """
    if not (output / "vae" / "diffusion_pytorch_model.safetensors").exists():
        fit_demo_vae(seed, recipe.latent_channels).save_pretrained(output / "vae")
    if not (output / "tokenizer" / "tokenizer_config.json").exists():
        build_tokenizer(seed).save_pretrained(output / "tokenizer")
    # Not `from_pretrained`, which would write the name of the folder into what is exported.
    vae: AutoencoderKLWan = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(output / "vae"))
    vae.load_state_dict(load_file(output / "vae" / "diffusion_pytorch_model.safetensors"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "tokenizer", local_files_only=True)
    torch.manual_seed(seed)
    return vae, build_model(len(tokenizer), recipe), tokenizer


if __name__ == "__main__":
    main()

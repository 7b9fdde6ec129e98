"""Writes the trained demo as a WanPipeline folder, with the demo's settings, a model card and sample frames."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image
from transformers import PreTrainedTokenizerFast

from diffsparse.eval.output_file import write_json
from diffsparse.eval.train_demo_transformer import MAX_SEQUENCE_LENGTH, TIMESTEP_SHIFT, TextToLatents

GUIDANCE_SCALE = 4.0
NUM_INFERENCE_STEPS = 20
FRAMES_PER_SECOND = 8
SHEET_COLUMNS = 5


def export_pipeline(
    folder: Path,
    vae: AutoencoderKLWan,
    model: TextToLatents,
    tokenizer: PreTrainedTokenizerFast,
    grid: tuple[int, int, int],
    dtype: torch.dtype = torch.bfloat16,
) -> WanPipeline:
    """Save everything `WanPipeline.from_pretrained(folder)` needs, and `demo.json`; gives the pipeline in `dtype`."""
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=copy.deepcopy(model.text_encoder).to(dtype).eval(),
        vae=copy.deepcopy(vae).to(dtype).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=TIMESTEP_SHIFT),
        transformer=copy.deepcopy(model.transformer).to(dtype).eval(),
    )
    pipe.save_pretrained(folder)
    write_json(folder / "demo.json", call_settings(grid) | {"fps": FRAMES_PER_SECOND})
    return pipe


def call_settings(grid: tuple[int, int, int]) -> dict[str, int | float | str]:
    """What to call the pipeline with, for a latent grid (frames, height, width)."""
    frames, height, width = grid
    return {
        "negative_prompt": "",
        "height": 8 * height,
        "width": 8 * width,
        # without compression in time the pipeline adds one to what it is asked for
        "num_frames": frames - 1,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
    }


def contact_sheet(pipe: WanPipeline, prompts: list[str], path: Path, grid: tuple[int, int, int]) -> None:
    """Sample every prompt with seed 0 and write a few frames of each, one prompt a row, to a PNG."""
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(0)
        video = pipe(prompt, generator=generator, output_type="np", **call_settings(grid)).frames[0]
        chosen = np.linspace(0, len(video) - 1, SHEET_COLUMNS).round().astype(int)
        rows.append(np.concatenate(list(video[chosen]), axis=1))
        sheet = (np.concatenate(rows, axis=0).clip(0, 1) * 255).round().astype(np.uint8)
        Image.fromarray(sheet).quantize(128).save(path, optimize=True)


def write_model_card(folder: Path, log: Path, *, options: str, prompts: list[str], notes: str) -> None:
    """README.md: what was trained, by which `options`, for how long, with what loss, and what the samples show."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    denoiser = [line for line in lines if line["stage"] == "transformer"]
    grids: dict[str, dict[str, float]] = {line["grid"]: line for line in denoiser}
    table = "\n".join(
        f"| {grid} | {line['step']:,.0f} | {line['seconds'] / 60:.0f} | {line['loss']:.3f} |"
        for grid, line in grids.items()
    )
    rows = "\n".join(f"{number}. {prompt}" for number, prompt in enumerate(prompts, 1))
    card = f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# The demo pipeline of diffsparse

A small text-to-video model in the shape of Wan: stock `WanTransformer3DModel`, `AutoencoderKLWan` and
`UMT5EncoderModel`, small enough to ship in a package and trained, so that its attention has earned its structure.
It exists to compare sparse with dense attention where no large model is at hand; it knows nothing but the little
world that it was trained on.

- **Data**: captioned video rendered by `diffsparse/eval/synthetic_video.py`: one or two textured shapes that move,
  turn or pulse, one in front of the other, over drifting backgrounds. No outside data.
- **Training**: `python -m diffsparse.eval.train_demo {options}`, in bfloat16 where the hardware has it. The
  autoencoder is fitted in closed form (principal components of patches, `diffsparse/eval/linear_vae.py`); text
  encoder and transformer are trained together by flow matching, Muon and AdamW; the averaged weights are exported.
- **Size**: see `demo.json` for the size it was trained to sample.

| latent grid (frames x height x width) | up to step | minutes | flow-matching loss there |
|---|---|---|---|
{table}

## What comes out

{notes}

![frames of sampled videos](samples.png)

Rows from top to bottom, seed 0, dense attention, first frame to last:

{rows}
"""
    (folder / "README.md").write_text(card, encoding="utf-8")

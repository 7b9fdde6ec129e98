"""Noise in place of the videos of `diffsparse eval run`: quick, and decided by all that decides a video."""

from __future__ import annotations

import numpy as np

import diffsparse
from diffsparse.eval import run_videos
from diffsparse.eval.generate import Generation


class Killed(BaseException):
    """What stops a process wherever it is."""


def fake_videos(patch, stop=lambda made: None):
    """The prompts of the videos made so far, warm-ups not counted; `stop(made)` may end the process at the last."""
    made = []

    def fake(pipe, prompt, seed, sampling, on_step=lambda: None):
        if sampling.num_inference_steps > 1:
            made.append(prompt)
            stop(made)
        for _ in range(sampling.num_inference_steps):
            on_step()
        noise = np.random.default_rng([seed, diffsparse.is_sparse_attention_enabled(pipe), *prompt.encode()])
        return Generation(noise.random((2, 12, 16, 3), dtype=np.float32), (0.5, 0.5), 1.5)

    patch.setattr(run_videos, "generate", fake)
    return made

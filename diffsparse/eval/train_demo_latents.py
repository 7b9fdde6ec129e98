"""Training clips for the demo model: rendered, then encoded by the linear autoencoder."""

from __future__ import annotations

from collections import deque

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from diffsparse.eval.linear_vae import PATCH_SIZE, fit_linear_vae
from diffsparse.eval.synthetic_video import random_scene, render

CLIPS_AT_ONCE = 32


def fit_demo_vae(seed: int, num_components: int, num_clips: int = 200, side: int = 64) -> AutoencoderKLWan:
    """The autoencoder, fitted to parts of the canvas at the scales of all training grids."""
    generator = torch.Generator().manual_seed(seed)
    clips = []
    for _ in range(num_clips):
        zoom, x, y = torch.rand(3, generator=generator).tolist()
        look_at = (0.6 * x - 0.3, 0.6 * y - 0.3)
        clips.append(render(random_scene(generator), 3, side, side, zoom=1 + zoom, look_at=look_at))
    return fit_linear_vae(torch.stack(clips) * 2 - 1, num_components)


def encoded_frames(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Video [B, 3, F, H, W] in 0..1 as latents [B, C, F, H/8, W/8], all frames at once.

    Only right for an autoencoder that takes every frame by itself, as `fit_linear_vae` makes them.
    """
    frames = video.movedim(2, 1).flatten(0, 1)[:, :, None]  # [B * F, 3, 1, H, W]
    with torch.no_grad():
        latents = vae.encode(frames * 2 - 1).latent_dist.mode()
    return latents.squeeze(2).unflatten(0, (len(video), -1)).movedim(1, 2)


class LatentPool:
    """The newest rendered and encoded clips of one grid, with their captions, on the autoencoder's device."""

    def __init__(self, vae: AutoencoderKLWan, grid: tuple[int, int, int], capacity: int = 2048) -> None:
        self.vae = vae
        self.grid = grid
        self.clips: deque[tuple[Tensor, str]] = deque(maxlen=capacity)
        # [C, 1, 1, 1]
        self._mean = torch.tensor(vae.config.latents_mean, device=vae.device).view(-1, 1, 1, 1)
        self._std = torch.tensor(vae.config.latents_std, device=vae.device).view(-1, 1, 1, 1)

    def grow(self, count: int, generator: torch.Generator) -> None:
        """Render and encode `count` new clips; past the capacity they replace the oldest."""
        for start in range(0, count, CLIPS_AT_ONCE):
            self._add(min(CLIPS_AT_ONCE, count - start), generator)

    def _add(self, count: int, generator: torch.Generator) -> None:
        frames, height, width = self.grid
        scenes = [random_scene(generator) for _ in range(count)]
        size = (frames, PATCH_SIZE * height, PATCH_SIZE * width)
        video = torch.stack([render(scene, *size, device=self.vae.device) for scene in scenes])
        latents = (encoded_frames(self.vae, video) - self._mean) / self._std
        self.clips.extend(zip(latents, [scene.caption for scene in scenes], strict=True))

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Latents [batch, C, F, H, W] and captions, drawn without replacement."""
        chosen = torch.randperm(len(self.clips), generator=generator)[:batch].tolist()
        return torch.stack([self.clips[i][0] for i in chosen]), [self.clips[i][1] for i in chosen]

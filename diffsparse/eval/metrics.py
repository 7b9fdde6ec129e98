"""How close two videos are, frame by frame: PSNR, SSIM and MS-SSIM."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Frames = NDArray[Any]
"""Frames [F, H, W, 3]: uint8, or floats between 0 and 1."""

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1 = 0.01**2
SSIM_C2 = 0.03**2

# Of each scale, the finest first: Wang, Simoncelli and Bovik 2003.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_SMALLEST_SIDE = SSIM_WINDOW * 2 ** (len(MS_SSIM_WEIGHTS) - 1)


@dataclass(frozen=True)
class FrameScores:
    """One metric over the frames of a video, first frame first."""

    per_frame: tuple[float, ...]
    higher_is_better: bool

    @property
    def mean(self) -> float:
        """Mean over the frames, without those of infinite score: an identical frame says nothing of the others.

        Infinite only if all frames are.
        """
        finite = [score for score in self.per_frame if not math.isinf(score)]
        return math.fsum(finite) / len(finite) if finite else math.inf

    @property
    def worst(self) -> float:
        """The score of the worst frame."""
        return self.per_frame[self.worst_frame]

    @property
    def worst_frame(self) -> int:
        """Index of the worst frame; one that is not a number is worse than any."""
        badness = [-score if self.higher_is_better else score for score in self.per_frame]
        return int(np.argmax(np.nan_to_num(np.array(badness), nan=np.inf, neginf=-np.inf)))

    @property
    def num_identical(self) -> int:
        """Frames of infinite score."""
        return sum(math.isinf(score) for score in self.per_frame)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON, which knows no infinity: it is the string "infinite" there."""
        return {
            "mean": as_json(self.mean),
            "worst": as_json(self.worst),
            "worst_frame": self.worst_frame,
            "per_frame": [as_json(score) for score in self.per_frame],
        }


def as_json(score: float) -> float | str:
    """The score as JSON can hold it."""
    if math.isnan(score):
        return "not a number"
    return "infinite" if math.isinf(score) else score


def psnr_db(a: Frames, b: Frames) -> list[float]:
    """Peak signal-to-noise ratio of each frame in dB, for a peak of 1; infinite where the frames are equal."""
    check_same_shape(a, b)
    scores = []
    for x, y in zip(a, b):
        error = as_unit_floats(x).astype(np.float64) - as_unit_floats(y)
        mse = float(np.square(error).mean())
        scores.append(-10 * math.log10(mse) if mse != 0 else math.inf)
    return scores


def ssim(a: Frames, b: Frames) -> list[float]:
    """Structural similarity of each frame, at most 1: Gaussian window of 11 and sigma 1.5, mean over R, G and B.

    With the constants of Wang et al. 2004 and, as there and in scikit-image, over the places where the window lies
    wholly inside the frame. (torchmetrics also counts a mirrored border.)

    Raises:
        ValueError: frames smaller than the window.
    """
    check_same_shape(a, b)
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM looks through a window of {SSIM_WINDOW} × {SSIM_WINDOW} pixels, "
            f"the frames have only {a.shape[2]} × {a.shape[1]}."
        )
    return [scales[0][0] for scales in _similarities_by_scale(a, b, num_scales=1)]


def ssim_and_ms_ssim(a: Frames, b: Frames) -> tuple[list[float], list[float]]:
    """What `ssim` gives, and the same over five scales, of which it is the finest: coarse structure counts as well.

    With the weights of Wang et al. 2003, the mean over R, G and B taken at each scale, as in torchmetrics. Contrast
    and structure that are opposite on the mean count as 0.

    Raises:
        ValueError: a side below `MS_SSIM_SMALLEST_SIDE`.
    """
    check_same_shape(a, b)
    if min(a.shape[1:3]) < MS_SSIM_SMALLEST_SIDE:
        raise ValueError(
            f"MS-SSIM needs frames of at least {MS_SSIM_SMALLEST_SIDE} pixels a side, got {a.shape[2]} × {a.shape[1]}."
        )
    scales_of_frames = _similarities_by_scale(a, b, len(MS_SSIM_WEIGHTS))
    return [scales[0][0] for scales in scales_of_frames], [_over_scales(scales) for scales in scales_of_frames]


def _over_scales(scales: list[tuple[float, float]]) -> float:
    # Luminance counts at the coarsest scale only.
    parts = [structure for _, structure in scales[:-1]] + [scales[-1][0]]
    return math.prod(max(0.0, part) ** weight for part, weight in zip(parts, MS_SSIM_WEIGHTS))


def _similarities_by_scale(a: Frames, b: Frames, num_scales: int) -> list[list[tuple[float, float]]]:
    """`_similarity_by_scale` of each frame, a frame a thread.

    torch's own threads meet after every operation. These are so small that on a busy machine they would mostly wait:
    six times the processor time was seen.
    """
    import torch

    num_threads = torch.get_num_threads()
    # Each thread has a number of its own, but new ones take it from the last that was set.
    alone = ThreadPoolExecutor(max(1, min(num_threads, len(a))), initializer=torch.set_num_threads, initargs=(1,))
    try:
        with alone as pool:
            return list(pool.map(_similarity_by_scale, a, b, itertools.repeat(num_scales)))
    finally:
        torch.set_num_threads(num_threads)


def _similarity_by_scale(a: Frames, b: Frames, num_scales: int) -> list[tuple[float, float]]:
    """The mean similarity of two frames [H, W, 3], and that of contrast with structure, at each scale from the finest.

    One colour after the other: arrays that small are used again by the allocator, larger ones are new memory each time.
    """
    import torch
    from torch.nn.functional import avg_pool2d

    means = np.empty((num_scales, 3, 2))
    for colour in range(3):
        x, y = (torch.from_numpy(as_unit_floats(frame[..., colour])).contiguous() for frame in (a, b))
        for scale in range(num_scales):
            luminance, structure = _similarities(x, y)
            means[scale, colour, 1] = structure.mean(dtype=torch.float64).item()
            means[scale, colour, 0] = luminance.mul_(structure).mean(dtype=torch.float64).item()
            if scale + 1 < num_scales:
                x, y = avg_pool2d(x[None], 2)[0], avg_pool2d(y[None], 2)[0]
    return [(float(similarity), float(structure)) for similarity, structure in means.mean(axis=1)]


def _similarities(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast with structure, of two pictures [H, W] of one colour at every place of the window."""
    import torch

    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blur(torch.stack([x, y, x * x, y * y, x * y]))
    covariance = mean_xy - mean_x * mean_y
    variances = (mean_xx - mean_x**2).clamp(min=0) + (mean_yy - mean_y**2).clamp(min=0)
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    return luminance, (2 * covariance + SSIM_C2) / (variances + SSIM_C2)


def _blur(x: Tensor) -> Tensor:
    """Gaussian means over the windows that lie wholly inside x [..., H, W].

    Sums of shifted pictures: ten times as fast as a depthwise convolution on a CPU.
    """
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    weights /= weights.sum()
    for dim in (-2, -1):
        size = x.shape[dim] - SSIM_WINDOW + 1
        blurred = x.narrow(dim, 0, size) * float(weights[0])
        for offset in range(1, SSIM_WINDOW):
            blurred.add_(x.narrow(dim, offset, size), alpha=float(weights[offset]))
        x = blurred
    return x


def as_unit_floats(frames: Frames) -> NDArray[np.float32]:
    """Frames as float32 between 0 and 1."""
    floats: NDArray[np.float32] = frames.astype(np.float32)
    return floats / np.float32(255) if frames.dtype == np.uint8 else floats


def check_same_shape(a: Frames, b: Frames) -> None:
    """Raise a ValueError unless both are frames [F, H, W, 3] of one shape."""
    if a.ndim != 4 or a.shape[-1] != 3 or a.shape != b.shape:
        raise ValueError(f"Frames must both be [F, H, W, 3] and of one shape, got {a.shape} and {b.shape}.")

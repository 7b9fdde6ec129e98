"""How close two videos are, frame by frame: PSNR, SSIM and MS-SSIM."""

from __future__ import annotations

import math
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
    squared_error = (as_unit_floats(a).astype(np.float64) - as_unit_floats(b)) ** 2
    # [F]
    return [-10 * math.log10(mse) if mse != 0 else math.inf for mse in squared_error.mean(axis=(1, 2, 3))]


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
    return [_ssim_of_frame(x, y) for x, y in zip(as_unit_floats(a), as_unit_floats(b))]


def ms_ssim(a: Frames, b: Frames) -> list[float]:
    """Structural similarity of each frame over five scales, at most 1: coarse structure counts as well as fine.

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
    return [_ms_ssim_of_frame(x, y) for x, y in zip(as_unit_floats(a), as_unit_floats(b))]


def _ssim_of_frame(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    import torch

    luminance, structure = _similarities(*_as_tensors(a, b))
    return (luminance * structure).mean(dtype=torch.float64).item()


def _ms_ssim_of_frame(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    import torch
    from torch.nn.functional import avg_pool2d

    x, y = _as_tensors(a, b)
    product = 1.0
    for scale, weight in enumerate(MS_SSIM_WEIGHTS, start=1):
        luminance, structure = _similarities(x, y)
        is_coarsest = scale == len(MS_SSIM_WEIGHTS)
        similarity = (luminance * structure if is_coarsest else structure).mean(dtype=torch.float64).item()
        product *= max(0.0, similarity) ** weight
        x, y = avg_pool2d(x, 2), avg_pool2d(y, 2)
    return product


def _as_tensors(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Two frames [H, W, 3] as [3, H, W]."""
    import torch

    x, y = (torch.from_numpy(frame).permute(2, 0, 1).contiguous() for frame in (a, b))
    return x, y


def _similarities(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast with structure, of two frames [3, H, W] at every place of the window."""
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

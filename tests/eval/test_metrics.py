from __future__ import annotations

import json
import math
import threading

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from diffsparse.eval.metrics import (
    MS_SSIM_SMALLEST_SIDE,
    MS_SSIM_WEIGHTS,
    FrameScores,
    psnr_db,
    ssim,
    ssim_and_ms_ssim,
)

SIZES = [(11, 11), (13, 40), (57, 31)]


def two_videos(size, noise=0.1, frames=3):
    random = np.random.default_rng(0)
    smooth = np.add.outer(np.linspace(0, 0.7, size[0]), np.linspace(0, 0.3, size[1]))[None, :, :, None]
    a = np.clip(smooth + 0.1 * random.standard_normal((frames, *size, 3)), 0, 1)
    b = np.clip(a + noise * random.standard_normal(a.shape), 0, 1)
    return a.astype(np.float32), b.astype(np.float32)


def as_torch(frames):
    return torch.from_numpy(frames).permute(0, 3, 1, 2).double()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("noise", [1e-3, 0.1, 1.0])
def test_psnr_is_that_of_torchmetrics(size, noise):
    a, b = two_videos(size, noise)
    expected = [
        peak_signal_noise_ratio(x[None], y[None], data_range=1.0).item() for x, y in zip(as_torch(a), as_torch(b))
    ]
    assert psnr_db(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("noise", [1e-3, 0.1, 1.0])
def test_ssim_is_that_of_torchmetrics_without_its_mirrored_border(size, noise):
    a, b = two_videos(size, noise)
    _, full = structural_similarity_index_measure(
        as_torch(a), as_torch(b), data_range=1.0, reduction="none", return_full_image=True
    )
    expected = full[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
    # Variances are differences of float32 means near 1: 2^-24 each, seen against C2 = 9e-4.
    assert ssim(a, b) == pytest.approx(expected.tolist(), abs=4 * 2**-24 / 9e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("as_bytes", [True, False])
def test_psnr_and_ssim_of_one_frame_are_those_of_scikit_image(size, as_bytes):
    reference = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    a, b = two_videos(size, frames=1)
    if as_bytes:
        a, b = ((255 * x).astype(np.uint8) for x in (a, b))
    data_range = 255 if as_bytes else 1.0
    psnr = reference.peak_signal_noise_ratio(a[0], b[0], data_range=data_range)
    assert psnr_db(a, b) == [pytest.approx(psnr, rel=1e-6)]
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": -1}
    expected = reference.structural_similarity(a[0], b[0], data_range=data_range, **wang)
    assert ssim(a, b) == [pytest.approx(expected, abs=4 * 2**-24 / 9e-4)]


def test_bytes_score_as_in_torchmetrics_with_its_range_of_255():
    a, b = ((255 * x).astype(np.uint8) for x in two_videos((33, 47), frames=1))
    x, y = (torch.from_numpy(frames).permute(0, 3, 1, 2).double() for frames in (a, b))
    assert psnr_db(a, b) == [pytest.approx(peak_signal_noise_ratio(x, y, data_range=255.0).item(), rel=1e-6)]
    _, full = structural_similarity_index_measure(x, y, data_range=255.0, return_full_image=True)
    assert ssim(a, b) == [pytest.approx(full[..., 5:-5, 5:-5].mean().item(), abs=4 * 2**-24 / 9e-4)]


def test_ssim_with_ms_ssim_is_what_it_is_alone():
    a, b = ((255 * x).astype(np.uint8) for x in two_videos((177, 180), frames=2))
    assert ssim_and_ms_ssim(a, b)[0] == ssim(a, b)
    assert ssim_and_ms_ssim(a, b) == ssim_and_ms_ssim(a / np.float32(255), b / np.float32(255))


@pytest.mark.parametrize(("size", "noise"), [((176, 176), 0.5), ((181, 203), 0.02)])
def test_ms_ssim_is_that_of_torchmetrics_without_its_mirrored_border(size, noise):
    a, b = two_videos(size, noise, frames=1)
    x, y = as_torch(a), as_torch(b)
    expected = torch.ones(1, dtype=torch.float64)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        options = {"data_range": 1.0, "reduction": "none"}
        _, contrast = structural_similarity_index_measure(x, y, **options, return_contrast_sensitivity=True)
        _, full = structural_similarity_index_measure(x, y, **options, return_full_image=True)
        expected *= (full[..., 5:-5, 5:-5].mean(dim=(1, 2, 3)) if scale == 4 else contrast) ** weight
        x, y = (torch.nn.functional.avg_pool2d(frames, 2) for frames in (x, y))
    # As for SSIM, and the weights sum to 1.
    assert ssim_and_ms_ssim(a, b)[1] == pytest.approx(expected.tolist(), abs=4 * 2**-24 / 9e-4)


def test_ms_ssim_of_opposite_structure_is_0_and_not_complex():
    a, _ = two_videos((176, 176), frames=1)
    assert ssim_and_ms_ssim(a, 1 - a)[1] == [0.0]
    assert ssim_and_ms_ssim(a, a)[1] == [pytest.approx(1, abs=1e-6)]


def test_ms_ssim_says_that_a_frame_is_too_small():
    a, b = two_videos((MS_SSIM_SMALLEST_SIDE - 1, 200), frames=1)
    with pytest.raises(ValueError, match="176 pixels a side, got 200 × 175"):
        ssim_and_ms_ssim(a, b)


def test_bytes_score_as_the_floats_they_stand_for():
    a, b = ((255 * x).astype(np.uint8) for x in two_videos((17, 23)))
    a_float, b_float = a / np.float32(255), b / np.float32(255)
    assert psnr_db(a, b) == psnr_db(a_float, b_float)
    assert ssim(a, b) == ssim(a_float, b_float)


def test_equal_frames_are_infinitely_close():
    a, _ = two_videos((12, 12))
    assert psnr_db(a, a) == [math.inf] * 3
    assert ssim(a, a) == [pytest.approx(1, abs=1e-6)] * 3


def test_each_frame_is_scored_by_itself():
    a, b = two_videos((12, 14))
    assert psnr_db(a, b) == [psnr_db(a[i : i + 1], b[i : i + 1])[0] for i in range(3)]


def test_the_number_of_torch_threads_is_left_as_it_was():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        a, b = two_videos((12, 14))
        several = ssim(a, b)
        in_a_new_thread = []
        thread = threading.Thread(target=lambda: in_a_new_thread.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert [torch.get_num_threads(), *in_a_new_thread] == [3, 3]
        torch.set_num_threads(1)
        assert ssim(a, b) == several
    finally:
        torch.set_num_threads(before)


def test_scores_are_symmetric():
    a, b = two_videos((15, 12))
    assert psnr_db(a, b) == psnr_db(b, a)
    assert ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-6)


@pytest.mark.parametrize("metric", [psnr_db, ssim])
def test_different_shapes_are_refused(metric):
    a, b = two_videos((12, 12))
    with pytest.raises(ValueError, match="one shape"):
        metric(a, b[:2])
    with pytest.raises(ValueError, match=r"\[F, H, W, 3\]"):
        metric(a[0], b[0])


def test_ssim_says_that_a_frame_is_too_small():
    a, b = two_videos((10, 12))
    with pytest.raises(ValueError, match="12 × 10"):
        ssim(a, b)


def test_the_worst_frame_is_the_lowest_where_higher_is_better():
    scores = FrameScores((30.0, 20.0, math.inf), higher_is_better=True)
    assert (scores.worst, scores.worst_frame) == (20.0, 1)
    assert FrameScores((0.1, 0.3, 0.2), higher_is_better=False).worst == 0.3


def test_equal_frames_are_left_out_of_the_mean():
    assert FrameScores((30.0, 20.0, math.inf), higher_is_better=True).mean == 25.0
    assert FrameScores((math.inf, math.inf), higher_is_better=True).mean == math.inf


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_not_a_number_is_the_worst_score_and_spoils_the_mean(higher_is_better):
    scores = FrameScores((1.0, math.nan, 3.0), higher_is_better)
    assert scores.worst_frame == 1
    assert math.isnan(scores.mean)


def test_scores_are_strict_json():
    scores = FrameScores((30.0, math.inf, math.nan), higher_is_better=True)
    text = json.dumps(scores.as_dict(), allow_nan=False)
    assert json.loads(text)["per_frame"] == [30.0, "infinite", "not a number"]

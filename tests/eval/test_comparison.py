from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from diffsparse.eval import comparison
from diffsparse.eval.comparison import WINDOW, compare, windows_of
from diffsparse.eval.lpips_metric import NoLpips
from diffsparse.eval.video_io import write_images, write_video

NONE = NoLpips("alex", "n/a: none")


def noise(frames, seed=0, height=32, width=48):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_a_video_compares_with_a_folder_of_its_frames(tmp_path):
    smooth = np.broadcast_to(np.arange(48, dtype=np.uint8)[None, None, :, None] * 4, (3, 32, 48, 3))
    write_video(tmp_path / "a.mp4", smooth, fps=8)
    write_images(tmp_path / "b", smooth)
    scored = compare(windows_of(tmp_path / "a.mp4", tmp_path / "b"), NONE)
    assert scored.num_frames == 3
    assert scored.psnr_db.worst > 35


def test_lpips_is_asked_window_by_window_and_not_for_tiny_frames():
    class Fake:
        net = "squeeze"

        def __call__(self, a, b):
            return [float(len(a))] * len(a)

    fake = Fake()

    frames = noise(2, height=64, width=64)
    scored = compare([(frames, frames), (frames[:1], frames[:1])], fake)
    assert scored.lpips.per_frame == (2.0, 2.0, 1.0)
    tiny = noise(2, height=16, width=64)
    assert "at least 17 pixels a side, got 64 × 16" in compare([(tiny, tiny)], fake).lpips
    assert scored.as_dict()["lpips_net"] == "squeeze"
    assert scored.rows()[3][0] == "LPIPS, squeeze (0 is equal)"


def test_ms_ssim_and_flicker_are_there_where_they_can_be_or_say_why_not():
    large = noise(WINDOW + 1, height=176, width=180)
    scored = compare([(large[:WINDOW], large[:WINDOW]), (large[WINDOW:], large[WINDOW:])], NONE)
    assert len(scored.ms_ssim.per_frame) == WINDOW + 1
    assert scored.flicker.per_frame == (0.0,) * WINDOW
    small = compare([(large[:1, :32], large[:1, :32])], NONE)
    assert "at least 176 pixels a side, got 180 × 32" in small.ms_ssim
    assert "one frame" in small.flicker
    assert {"MS-SSIM", "Flicker"} <= {note.split()[0] for note in small.notes()}
    assert [mean for _, mean, _ in small.rows()[2:]] == ["n/a"] * 3


def test_windows_hold_every_frame_once(tmp_path):
    video = noise(2 * WINDOW + 1, height=4, width=4)
    write_images(tmp_path / "a", video)
    windows = list(windows_of(tmp_path / "a", tmp_path / "a"))
    assert [len(a) for a, _ in windows] == [WINDOW, WINDOW, 1]
    assert np.array_equal(np.concatenate([b for _, b in windows]), video)


def test_memory_is_of_a_window_of_frames_and_not_of_the_length(monkeypatch):
    height, width = 60, 80

    def peak(num_frames):
        random = np.random.default_rng(0)
        monkeypatch.setattr(
            comparison,
            "read_frames",
            lambda path: (random.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(num_frames)),
        )
        tracemalloc.start()
        compare(windows_of("a", "b"), NONE)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(WINDOW)
    # What is kept of each frame is its scores, a few numbers: 200 bytes, where a frame has 14,400.
    assert peak(40 * WINDOW) < peak(2 * WINDOW) + 38 * WINDOW * 200


@pytest.mark.parametrize("lengths", [(3, 7), (7, 3), (1, 2)])
def test_different_lengths_are_an_error_that_gives_both(tmp_path, lengths):
    for name, length in zip("ab", lengths):
        write_images(tmp_path / name, noise(length))
    with pytest.raises(ValueError, match=rf"a has {lengths[0]} frames, .*b has {lengths[1]}\. .*cut the longer"):
        compare(windows_of(tmp_path / "a", tmp_path / "b"), NONE)


def test_different_sizes_are_an_error_that_gives_both(tmp_path):
    write_images(tmp_path / "a", noise(2))
    write_images(tmp_path / "b", noise(2, height=34))
    with pytest.raises(ValueError, match=r"48 × 32 .* 48 × 34.*scale one of them"):
        compare(windows_of(tmp_path / "a", tmp_path / "b"), NONE)


def test_a_folder_of_mixed_sizes_is_an_error(tmp_path):
    write_images(tmp_path / "a", noise(2))
    write_images(tmp_path / "other", noise(2, height=34))
    (tmp_path / "other" / "00001.png").replace(tmp_path / "a" / "00001.png")
    with pytest.raises(ValueError, match="frame 1 of"):
        compare(windows_of(tmp_path / "a", tmp_path / "a"), NONE)

from __future__ import annotations

import base64

import numpy as np
import pytest

from diffsparse.eval.lpips_metric import NoLpips
from diffsparse.eval.report_clips import BRIGHTEST_ERROR, LARGEST_PANE, error_map, make_clips, three_panes
from diffsparse.eval.report_data import collect
from diffsparse.eval.video_io import read_frames


def test_the_error_map_is_black_where_all_is_equal_and_brightest_where_it_is_not():
    dense = np.full((4, 6, 3), 100, dtype=np.uint8)
    sparse = dense.copy()
    sparse[1, 2] += round(255 * BRIGHTEST_ERROR) + 1
    sparse[3, 3] += 5
    brightness = error_map(dense, sparse).astype(int).sum(axis=-1)
    assert brightness[0, 0] < brightness[3, 3] < brightness[1, 2]
    assert brightness[0, 0] < 10
    assert (brightness == brightness[0, 0]).sum() == 22


@pytest.mark.parametrize("size", [(34, 48), (17, 33), (720, 1280)])
def test_three_panes_of_even_size_and_of_the_shape_of_the_video(size):
    dense, sparse = np.full((*size, 3), 200, dtype=np.uint8), np.full((*size, 3), 90, dtype=np.uint8)
    panes = three_panes(dense, sparse)
    height, width = panes.shape[0], panes.shape[1] // 3
    assert height % 2 == width % 2 == panes.shape[1] % 3 == 0
    assert width <= LARGEST_PANE
    assert width / height == pytest.approx(size[1] / size[0], rel=0.02)
    assert (panes[:, :width] == 200).all()
    assert (panes[:, width : 2 * width] == 90).all()


def test_the_worst_of_each_config_comes_first_and_what_does_not_fit_is_told(fake_run, tmp_path):
    run = fake_run(["a", "b"], ["fast", "slow"], error=lambda config, p, s: (0.2 if config == "fast" else 0.1) + p / 20)
    data = collect([run], NoLpips("alex", "n/a: none"))
    clips, left_out = make_clips(data, 10**9)
    order = [("fast", 1), ("slow", 1), ("fast", 0), ("slow", 0)]
    assert [(clip.video["config"], clip.video["prompt_index"]) for clip in clips] == order
    assert left_out == []
    file = tmp_path / "clip.mp4"
    file.write_bytes(base64.b64decode(clips[0].uri.partition(",")[2]))
    frames = list(read_frames(file))
    assert len(frames) == clips[0].num_frames == 3
    assert frames[0].shape == (clips[0].pane_height, 3 * clips[0].pane_width, 3)
    fewer, left_out = make_clips(data, len(clips[0].uri) + 1)
    assert [clip.video for clip in fewer] == [clips[0].video]
    assert len(left_out) == 3

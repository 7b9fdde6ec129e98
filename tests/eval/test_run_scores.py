from __future__ import annotations

import json

import numpy as np
import pytest

from diffsparse.eval import run_scores
from diffsparse.eval.lpips_metric import NoLpips
from diffsparse.eval.metrics import psnr_db
from diffsparse.eval.run_folder import Pair, RunFolder
from diffsparse.eval.run_scores import scores_of
from diffsparse.eval.video_io import read_frames

NO_LPIPS = NoLpips("alex", "n/a: none")


class FakeLpips:
    def __init__(self, net, score):
        self.net, self.score = net, score

    def __call__(self, a, b):
        return [self.score] * len(a)


def test_scores_are_of_the_stored_frames_and_kept(fake_run, monkeypatch):
    folder = RunFolder(fake_run(["a"]))
    scores = scores_of(folder, "fast", Pair(0, 0), NO_LPIPS)
    dense, sparse = (np.stack(list(read_frames(folder.frames(name, Pair(0, 0))))) for name in ("dense", "fast"))
    assert scores["psnr_db"]["per_frame"] == pytest.approx(psnr_db(dense, sparse))
    monkeypatch.setattr(run_scores, "compare", None)
    assert scores_of(folder, "fast", Pair(0, 0), NO_LPIPS) == json.loads(json.dumps(scores))
    assert scores_of(folder, "fast", Pair(0, 0), NoLpips("alex", "n/a: other"))["lpips"] == "n/a: other"


def test_a_video_made_anew_is_scored_anew(fake_run):
    folder = RunFolder(fake_run(["a"]))
    before = scores_of(folder, "fast", Pair(0, 0), NO_LPIPS)
    folder.add("fast", Pair(0, 0), np.zeros((3, 34, 48, 3), dtype=np.uint8), folder.record("fast", Pair(0, 0)))
    assert scores_of(folder, "fast", Pair(0, 0), NO_LPIPS) != before


def test_lpips_is_computed_once_it_can_be(fake_run):
    folder = RunFolder(fake_run(["a"]))
    scores_of(folder, "fast", Pair(0, 0), NO_LPIPS)
    assert scores_of(folder, "fast", Pair(0, 0), FakeLpips("alex", 0.5))["lpips"]["mean"] == 0.5
    assert scores_of(folder, "fast", Pair(0, 0), NO_LPIPS)["lpips"]["mean"] == 0.5


def test_lpips_of_one_net_is_never_taken_for_that_of_another(fake_run):
    folder = RunFolder(fake_run(["a"]))
    scores_of(folder, "fast", Pair(0, 0), FakeLpips("alex", 0.5))
    of_vgg = scores_of(folder, "fast", Pair(0, 0), NoLpips("vgg", "n/a: no vgg"))
    assert (of_vgg["lpips"], of_vgg["lpips_net"]) == ("n/a: no vgg", "vgg")
    of_vgg = scores_of(folder, "fast", Pair(0, 0), FakeLpips("vgg", 0.75))
    assert (of_vgg["lpips"]["mean"], of_vgg["lpips_net"]) == (0.75, "vgg")


@pytest.mark.parametrize(
    "change", [{"psnr_db": {}}, {"ssim": None}, {"flicker": ...}, {"lpips_net": 3}, {"ms_ssim": {"mean": None}}]
)
def test_damaged_scores_are_computed_again(fake_run, change):
    folder = RunFolder(fake_run(["a"]))
    scores = scores_of(folder, "fast", Pair(0, 0), NO_LPIPS)
    file = folder.path / "fast" / "000-seed0.scores.json"
    kept = json.loads(file.read_text())
    damaged = {key: value for key, value in (kept["scores"] | change).items() if value is not ...}
    for contents in (kept | {"scores": damaged}, kept | {"scores": None}):
        file.write_text(json.dumps(contents))
        assert scores_of(folder, "fast", Pair(0, 0), NO_LPIPS) == scores
        assert json.loads(file.read_text()) == kept

"""The backbone here is random, which only these tests may have: they are about the arithmetic and the loading."""

from __future__ import annotations

import hashlib
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from torchvision.models import alexnet

from diffsparse.eval import lpips_metric
from diffsparse.eval.lpips_metric import BACKBONE_NAME, SMALLEST_SIDE, Lpips, lpips_or_reason


@pytest.fixture(scope="module")
def features():
    torch.manual_seed(0)
    return alexnet(weights=None).features.eval()


@pytest.fixture(scope="module")
def backbone(features, tmp_path_factory):
    file = tmp_path_factory.mktemp("backbone") / BACKBONE_NAME
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, file)
    return file


@pytest.fixture
def trusted(backbone, monkeypatch):
    """The random backbone passes for the real one."""
    start = hashlib.sha256(backbone.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(lpips_metric, "BACKBONE_SHA256_START", start)
    return backbone


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def two_videos(height, width, frames=2):
    random = np.random.default_rng(1)
    a = random.random((frames, height, width, 3), dtype=np.float32)
    return a, np.clip(a + 0.2 * random.standard_normal(a.shape), 0, 1).astype(np.float32)


def lpips_by_hand(features, a, b):
    """Squared distances of unit features after each ReLU, weighted, mean over places, summed over layers."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    weights = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth", map_location="cpu")
    x, y = (((2 * torch.from_numpy(frames) - 1 - shift) / scale).permute(0, 3, 1, 2) for frames in (a, b))
    total, layer = torch.zeros(len(a)), 0
    # Without the last pooling.
    for module in features[:-1]:
        x, y = module(x), module(y)
        if isinstance(module, torch.nn.ReLU):
            distance = (x / x.norm(dim=1, keepdim=True) - y / y.norm(dim=1, keepdim=True)) ** 2
            weighted = distance * weights[f"lin{layer}.model.1.weight"].reshape(1, -1, 1, 1)
            total += weighted.sum(dim=1).mean(dim=(1, 2))
            layer += 1
    return total


@pytest.mark.parametrize("size", [(64, 64), (SMALLEST_SIDE, 70)])
@torch.no_grad()
def test_scores_are_those_of_the_backbone_in_the_file(trusted, features, size):
    a, b = two_videos(*size)
    assert Lpips(trusted)(a, b) == pytest.approx(lpips_by_hand(features, a, b).tolist(), rel=1e-4)


def test_equal_frames_are_at_distance_zero(trusted):
    a, _ = two_videos(40, 40)
    assert Lpips(trusted)(a, a) == [0.0, 0.0]


def test_no_backbone_gives_the_way_to_get_one(empty_cache):
    reason = lpips_or_reason()
    assert isinstance(reason, str)
    assert reason.startswith("n/a: ")
    assert BACKBONE_NAME in reason
    assert "--lpips-backbone" in reason
    assert str(empty_cache) in reason


def test_the_cached_backbone_is_found(trusted, empty_cache):
    empty_cache.mkdir(parents=True)
    (empty_cache / BACKBONE_NAME).write_bytes(trusted.read_bytes())
    assert isinstance(lpips_or_reason(), Lpips)


def test_other_weights_are_never_taken_for_the_backbone(backbone):
    with pytest.raises(ValueError, match="not the AlexNet"):
        lpips_or_reason(backbone)


def test_a_damaged_cache_is_a_reason_and_not_an_error(empty_cache):
    empty_cache.mkdir(parents=True)
    (empty_cache / BACKBONE_NAME).write_bytes(b"half a download")
    assert "not the AlexNet" in lpips_or_reason()


def test_a_named_backbone_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        lpips_or_reason(tmp_path / "none.pth")


def test_nothing_is_downloaded(trusted, empty_cache, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("tried to download")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    lpips_or_reason()
    lpips_or_reason(trusted)

"""The backbones here are random, which only these tests may have: they are about the arithmetic and the loading."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lpips
import numpy as np
import pytest
import torch
import torchvision
from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

from diffsparse.eval import lpips_metric
from diffsparse.eval.lpips_backbone import BACKBONES
from diffsparse.eval.lpips_metric import Lpips, NoLpips, lpips_or_reason

TORCHVISION_NAMES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}

# Layers of torchvision's `features` after which the paper's code compares.
COMPARED_AFTER = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29), "squeeze": (1, 4, 7, 9, 10, 11, 12)}


@pytest.fixture(scope="module")
def loaded(random_backbones):
    """LPIPS on each net, loaded once: to build a VGG takes a second."""
    made = {}

    def load(net):
        if net not in made:
            with random_backbones.trusted():
                made[net] = Lpips(random_backbones.file(net), net)
        return made[net]

    return load


@pytest.fixture
def references(random_backbones, monkeypatch):
    """The lpips package and torchmetrics, as their users call them, find our backbone in torchvision."""
    for net, name in TORCHVISION_NAMES.items():
        model = SimpleNamespace(features=random_backbones.features(net))
        monkeypatch.setattr(torchvision.models, name, lambda *args, model=model, **kwargs: model)


def two_videos(height, width, frames=2):
    random = np.random.default_rng(1)
    a = random.random((frames, height, width, 3), dtype=np.float32)
    return a, np.clip(a + 0.2 * random.standard_normal(a.shape), 0, 1).astype(np.float32)


def as_torch(frames):
    """[F, 3, H, W]"""
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def lpips_by_hand(net, features, a, b):
    """Squared distances of unit features after some layers, weighted, mean over places, summed over layers."""
    shift, scale = (torch.tensor(x).reshape(1, 3, 1, 1) for x in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    weights = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth", map_location="cpu")
    x, y = ((2 * as_torch(frames) - 1 - shift) / scale for frames in (a, b))
    total, layer = torch.zeros(len(a)), 0
    for index, module in enumerate(features):
        if layer == len(COMPARED_AFTER[net]):
            break
        x, y = module(x), module(y)
        if index in COMPARED_AFTER[net]:
            distance = (x / x.norm(dim=1, keepdim=True) - y / y.norm(dim=1, keepdim=True)).nan_to_num() ** 2
            weighted = distance * weights[f"lin{layer}.model.1.weight"].reshape(1, -1, 1, 1)
            total += weighted.sum(dim=1).mean(dim=(1, 2))
            layer += 1
    return total


@pytest.mark.parametrize("net", BACKBONES)
@pytest.mark.parametrize("size", [(64, 64), (31, 71)])
@torch.no_grad()
def test_scores_are_those_of_the_backbone_in_the_file(loaded, random_backbones, net, size):
    a, b = two_videos(*size)
    expected = lpips_by_hand(net, random_backbones.features(net), a, b).tolist()
    assert loaded(net)(a, b) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("net", BACKBONES)
@torch.no_grad()
def test_scores_are_those_of_the_lpips_package_and_of_torchmetrics(loaded, references, net):
    a, b = two_videos(33, 47, frames=1)
    package = lpips.LPIPS(net=net, verbose=False)
    scores = loaded(net)(a, b)
    assert scores == [pytest.approx(package(2 * as_torch(a) - 1, 2 * as_torch(b) - 1).item(), rel=1e-5)]
    # It divides by norms of 1e-8 more, we by 1e-10.
    torchmetrics = learned_perceptual_image_patch_similarity(as_torch(a), as_torch(b), net_type=net, normalize=True)
    assert scores == [pytest.approx(torchmetrics.item(), rel=1e-4)]


@pytest.mark.parametrize("net", BACKBONES)
def test_bytes_score_as_the_floats_they_stand_for(loaded, net):
    a, b = ((255 * x).astype(np.uint8) for x in two_videos(32, 33, frames=1))
    assert loaded(net)(a, b) == loaded(net)(a / np.float32(255), b / np.float32(255))


def test_frames_of_several_turns_are_scored_each_with_its_own(loaded, monkeypatch):
    a, b = two_videos(32, 33, frames=5)
    one_by_one = [loaded("squeeze")(a[[frame]], b[[frame]])[0] for frame in range(5)]
    for frames_at_a_time in (0, 2, 5):
        monkeypatch.setattr(lpips_metric, "PIXELS_AT_A_TIME", frames_at_a_time * 32 * 33)
        assert loaded("squeeze")(a, b) == pytest.approx(one_by_one, rel=1e-4)


@pytest.mark.parametrize("net", BACKBONES)
def test_equal_frames_are_at_distance_zero(loaded, net):
    a, _ = two_videos(40, 40)
    assert loaded(net)(a, a) == [0.0, 0.0]


@pytest.mark.parametrize("net", BACKBONES)
def test_the_smallest_side_is_the_smallest_that_works(loaded, net):
    side = BACKBONES[net].smallest_side
    a, b = two_videos(side, 40, frames=1)
    assert 0 < loaded(net)(a, b)[0] < 10
    with pytest.raises(RuntimeError, match="too small"):
        loaded(net)(a[:, 1:], b[:, 1:])


@pytest.mark.parametrize("net", BACKBONES)
def test_no_backbone_gives_the_ways_to_get_one(empty_cache, net):
    missing = lpips_or_reason(net)
    assert isinstance(missing, NoLpips)
    assert missing.net == net
    assert missing.reason.startswith("n/a: ")
    for way in (f"fetch-lpips --net {net}", BACKBONES[net].address, "--lpips-backbone", str(empty_cache)):
        assert way in missing.reason


def test_the_cached_backbone_is_found(random_backbones, empty_cache):
    with random_backbones.trusted():
        random_backbones.put_into(empty_cache, "squeeze")
        assert isinstance(lpips_or_reason("squeeze"), Lpips)
        assert isinstance(lpips_or_reason("alex"), NoLpips)


def test_a_damaged_cache_is_a_reason_and_not_an_error(empty_cache):
    empty_cache.mkdir(parents=True)
    (empty_cache / BACKBONES["vgg"].file_name).write_bytes(b"half a download")
    assert "not the VGG-16" in lpips_or_reason("vgg").reason


def test_a_named_backbone_that_cannot_serve_is_an_error(random_backbones, tmp_path):
    with pytest.raises(ValueError, match=r"none\.pth is no file"):
        lpips_or_reason("alex", tmp_path / "none.pth")
    with pytest.raises(ValueError, match="not the SqueezeNet"):
        lpips_or_reason("squeeze", random_backbones.file("squeeze"))


def test_nothing_is_downloaded(random_backbones, empty_cache, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("tried to download")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    lpips_or_reason("squeeze")
    with random_backbones.trusted():
        lpips_or_reason("squeeze", random_backbones.file("squeeze"))

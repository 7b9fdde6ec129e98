from __future__ import annotations

import hashlib

import pytest
from torchvision.models import AlexNet_Weights, SqueezeNet1_1_Weights, VGG16_Weights

from diffsparse.eval.lpips_backbone import BACKBONES, check_backbone


@pytest.mark.parametrize(
    ("net", "weights"), [("alex", AlexNet_Weights), ("vgg", VGG16_Weights), ("squeeze", SqueezeNet1_1_Weights)]
)
def test_they_are_those_of_torchvision(net, weights):
    backbone = BACKBONES[net]
    assert backbone.address == weights.IMAGENET1K_V1.url
    # torchvision counts in 2^20 bytes.
    assert backbone.megabytes == round(weights.IMAGENET1K_V1.meta["_file_size"] * 2**20 / 1e6)
    assert len(bytes.fromhex(backbone.sha256_start)) == 4


def test_the_right_file_passes_and_one_changed_byte_does_not(random_backbones, tmp_path):
    file = random_backbones.file("squeeze")
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.pth").write_bytes(damaged)
    found = hashlib.sha256(damaged).hexdigest()[:8]
    with random_backbones.trusted():
        check_backbone(file, "squeeze")
        with pytest.raises(ValueError, match=rf"damaged\.pth is not the SqueezeNet.* begins {found}, expected"):
            check_backbone(tmp_path / "damaged.pth", "squeeze")


def test_what_is_no_file_is_refused_with_the_way_to_one(tmp_path):
    with pytest.raises(ValueError, match=r"--lpips-backbone .* is no file\. `diffsparse eval fetch-lpips --net vgg`"):
        check_backbone(tmp_path, "vgg")


def test_the_backbone_of_another_net_is_recognised(random_backbones):
    says = r"is SqueezeNet 1\.1, not VGG-16, .* Say --lpips-net squeeze"
    with random_backbones.trusted(), pytest.raises(ValueError, match=says):
        check_backbone(random_backbones.file("squeeze"), "vgg")

"""The networks under LPIPS, as torchvision distributes them: how large, where kept, and how to know the right file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Backbone:
    """One network trained on ImageNet. Its file's name ends in the beginning of the file's SHA-256."""

    title: str
    file_name: str
    megabytes: int
    smallest_side: int
    """In pixels: what is left of a smaller frame vanishes in the last pooling."""
    folder_address: str = "https://download.pytorch.org/models/"

    @property
    def address(self) -> str:
        """Where torchvision downloads it from."""
        return self.folder_address + self.file_name

    @property
    def sha256_start(self) -> str:
        """The beginning of the SHA-256, as in the name."""
        return self.file_name.removesuffix(".pth").rpartition("-")[2]

    @property
    def cached(self) -> Path:
        """Where torchvision keeps it once it has downloaded it."""
        import torch

        return Path(torch.hub.get_dir()) / "checkpoints" / self.file_name


BACKBONES = {
    "alex": Backbone("AlexNet", "alexnet-owt-7be5be79.pth", megabytes=244, smallest_side=31),
    "vgg": Backbone("VGG-16", "vgg16-397923af.pth", megabytes=553, smallest_side=16),
    "squeeze": Backbone("SqueezeNet 1.1", "squeezenet1_1-b8a52dc0.pth", megabytes=5, smallest_side=17),
}
"""By the name that the lpips package has for it."""


def check_backbone(file: Path, net: str) -> None:
    """Raise unless the file is the backbone of that net, to the byte.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file, another one, or a damaged one.
    """
    if not file.is_file():
        raise ValueError(f"--lpips-backbone {file} is no file. `diffsparse eval fetch-lpips --net {net}` downloads it.")
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    found = digest.hexdigest()
    backbone = BACKBONES[net]
    if found.startswith(backbone.sha256_start):
        return
    for other, its in BACKBONES.items():
        if found.startswith(its.sha256_start):
            raise ValueError(
                f"{file} is {its.title}, not {backbone.title}, which --lpips-net {net} needs. "
                f"Say --lpips-net {other}, or name another file."
            )
    raise ValueError(
        f"{file} is not the {backbone.title} that LPIPS was made with: its SHA-256 begins {found[:8]}, "
        f"expected {backbone.sha256_start}. `diffsparse eval fetch-lpips --net {net}` downloads it."
    )

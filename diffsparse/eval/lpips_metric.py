"""LPIPS, where its backbone is at hand; where not, a sentence that says how to get it. Nothing is downloaded.

LPIPS (arXiv:1801.03924) judges by the features of an AlexNet trained on ImageNet. The lpips package brings the weights
that lie on top, torchvision downloads the AlexNet. A random one gives numbers that look like LPIPS and are not.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

from diffsparse.eval.metrics import Frames, as_unit_floats, check_same_shape

BACKBONE_NAME = "alexnet-owt-7be5be79.pth"
BACKBONE_SHA256_START = "7be5be79"
BACKBONE_ADDRESS = f"https://download.pytorch.org/models/{BACKBONE_NAME}"

# What is left of a smaller frame vanishes in the second pooling.
SMALLEST_SIDE = 31


class Lpips:
    """LPIPS with the AlexNet from a file.

    Raises:
        OSError: no such file.
        ValueError: the file is not torchvision's AlexNet.
    """

    def __init__(self, backbone: Path, device: str = "cpu") -> None:
        import lpips
        import torch

        _check_backbone(backbone)
        with warnings.catch_warnings():
            # The lpips package calls torchvision in the way of before 0.13.
            warnings.simplefilter("ignore")
            model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        _load_backbone(model.net, torch.load(backbone, map_location="cpu", weights_only=True))
        self._model = model.to(device).requires_grad_(False)
        self._device = device

    def __call__(self, a: Frames, b: Frames) -> list[float]:
        """LPIPS of each frame, 0 for equal ones, for frames [F, H, W, 3] at least `SMALLEST_SIDE` high and wide."""
        import torch

        check_same_shape(a, b)
        scores = []
        for pair in zip(a, b):
            # [1, 3, H, W], twice
            first, second = (torch.from_numpy(as_unit_floats(x)).permute(2, 0, 1)[None] for x in pair)
            scores.append(self._model(first.to(self._device), second.to(self._device), normalize=True).item())
        return scores


def lpips_or_reason(backbone: Path | None = None, device: str = "cpu") -> Lpips | str:
    """LPIPS with the given backbone, or the one in torch's cache; without either, "n/a: …", the way to get one.

    Raises:
        OSError, ValueError: as `Lpips`, for a file that was named and cannot serve. A damaged file in the cache is
            a reason, not an error: nobody asked for it.
    """
    if backbone is not None:
        return Lpips(backbone, device)
    cached = cached_backbone()
    if not cached.is_file():
        return f"n/a: download {BACKBONE_ADDRESS} and name it by --lpips-backbone FILE, or put it into {cached.parent}"
    try:
        return Lpips(cached, device)
    except (OSError, ValueError) as error:
        return f"n/a: {error}"


def cached_backbone() -> Path:
    """Where torchvision keeps the backbone once it has downloaded it."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE_NAME


def _check_backbone(file: Path) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    if not digest.hexdigest().startswith(BACKBONE_SHA256_START):
        raise ValueError(
            f"{file} is not the AlexNet that LPIPS was made with: its SHA-256 begins {digest.hexdigest()[:8]}, "
            f"expected {BACKBONE_SHA256_START}. Download {BACKBONE_ADDRESS}."
        )


def _load_backbone(net: Any, weights: dict[str, Any]) -> None:
    """Fill every weight of LPIPS' copy of AlexNet, where layer features.3 is called slice2.3."""
    import torch

    with torch.no_grad():
        for name, parameter in net.named_parameters():
            _, layer_and_kind = name.split(".", maxsplit=1)
            parameter.copy_(weights[f"features.{layer_and_kind}"])

"""LPIPS, where its backbone is at hand; where not, a sentence that says how to get it. Nothing is downloaded.

LPIPS (arXiv:1801.03924) judges by the features of a network trained on ImageNet. The lpips package brings the weights
that lie on top, torchvision downloads the network. A random one gives numbers that look like LPIPS and are not.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsparse.eval.lpips_backbone import BACKBONES, check_backbone
from diffsparse.eval.metrics import Frames, as_unit_floats, check_same_shape

DEFAULT_NET = "alex"
PIXELS_AT_A_TIME = 2**20
"""Of all frames judged together: one of full HD, or a whole small video."""


class Lpips:
    """LPIPS on a net of `BACKBONES`, its weights from a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is no such file, or it is not torchvision's network.
    """

    def __init__(self, backbone: Path, net: str = DEFAULT_NET, device: str = "cpu") -> None:
        import lpips
        import torch

        check_backbone(backbone, net)
        with warnings.catch_warnings():
            # The lpips package calls torchvision in the way of before 0.13.
            warnings.simplefilter("ignore")
            model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        _load_backbone(model.net, torch.load(backbone, map_location="cpu", weights_only=True))
        self.net = net
        self._model = model.to(device).requires_grad_(False)
        self._device = device

    def __call__(self, a: Frames, b: Frames) -> list[float]:
        """LPIPS of each frame, 0 for equal ones, for frames [F, H, W, 3] of the net's smallest side or more."""
        import torch

        check_same_shape(a, b)
        scores = []
        at_a_time = max(1, PIXELS_AT_A_TIME // (a.shape[1] * a.shape[2]))
        for start in range(0, len(a), at_a_time):
            # [F, 3, H, W], twice
            first, second = (
                torch.from_numpy(as_unit_floats(x[start : start + at_a_time])).permute(0, 3, 1, 2) for x in (a, b)
            )
            scores += self._model(first.to(self._device), second.to(self._device), normalize=True).flatten().tolist()
        return scores


@dataclass(frozen=True)
class NoLpips:
    """LPIPS on a net that is not at hand."""

    net: str
    reason: str
    """"n/a: …", with the way to get it."""


def add_lpips_arguments(parser: argparse.ArgumentParser) -> None:
    """Which net, and where it lies."""
    parser.add_argument(
        "--lpips-net",
        choices=list(BACKBONES),
        default=DEFAULT_NET,
        help=f"the network that LPIPS judges by (default: {DEFAULT_NET})",
    )
    parser.add_argument(
        "--lpips-backbone",
        type=Path,
        metavar="FILE",
        help="torchvision's weights of that network (default: looked for in torch's cache, where "
        "`diffsparse eval fetch-lpips` puts them; never downloaded)",
    )


def lpips_or_reason(net: str = DEFAULT_NET, backbone: Path | None = None, device: str = "cpu") -> Lpips | NoLpips:
    """LPIPS with the given backbone, or the one in torch's cache; without either, the way to get one.

    Raises:
        OSError, ValueError: as `Lpips`, for a file that was named and cannot serve. A damaged file in the cache is
            a reason, not an error: nobody asked for it.
    """
    if backbone is not None:
        return Lpips(backbone, net, device)
    known = BACKBONES[net]
    if not known.cached.is_file():
        return NoLpips(
            net,
            f"n/a: {known.title} is not at hand. Either run `diffsparse eval fetch-lpips --net {net}` on a machine "
            f"with a network ({known.megabytes} MB), or download {known.address} and name it by --lpips-backbone FILE, "
            f"or put it into {known.cached.parent}",
        )
    try:
        return Lpips(known.cached, net, device)
    except (OSError, ValueError) as error:
        return NoLpips(net, f"n/a: {str(error).removesuffix('.')}")


def lpips_for(lpips: Lpips | NoLpips, height: int, width: int) -> Lpips | NoLpips:
    """The same for frames of that size, or why it cannot judge them."""
    smallest_side = BACKBONES[lpips.net].smallest_side
    if isinstance(lpips, NoLpips) or min(height, width) >= smallest_side:
        return lpips
    reason = f"n/a: it needs frames of at least {smallest_side} pixels a side, got {width} × {height}"
    return NoLpips(lpips.net, reason)


def _load_backbone(net: Any, weights: dict[str, Any]) -> None:
    """Fill every weight of LPIPS' copy of the network, where layer features.3 is called slice2.3."""
    import torch

    with torch.no_grad():
        for name, parameter in net.named_parameters():
            _, layer_and_kind = name.split(".", maxsplit=1)
            parameter.copy_(weights[f"features.{layer_and_kind}"])

"""`diffsparse eval fetch-lpips`: the networks under LPIPS, into torch's cache, where every command finds them."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffsparse.eval.lpips_backbone import BACKBONES, check_backbone
from diffsparse.eval.lpips_metric import DEFAULT_NET


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which networks."""
    parser.add_argument(
        "--net", nargs="+", choices=list(BACKBONES), default=[DEFAULT_NET], help=f"default: {DEFAULT_NET}"
    )


def run(args: argparse.Namespace) -> int:
    """Download what is not there yet, and say where it lies."""
    for net in dict.fromkeys(args.net):
        file = BACKBONES[net].cached
        if _is_whole(file, net):
            print(f"{net}: {file} is there already, its SHA-256 is right.")
        else:
            fetch_backbone(net)
            print(f"{net}: {file}, its SHA-256 is right. --lpips-net {net} finds it there.")
    return 0


def fetch_backbone(net: str) -> None:
    """Download a backbone into torch's cache: whole and with the right SHA-256, or not at all.

    Raises:
        OSError: it cannot be downloaded.
        ValueError: what came is another file.
    """
    import torch

    backbone = BACKBONES[net]
    backbone.cached.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(backbone.address, str(backbone.cached), hash_prefix=backbone.sha256_start)
    except OSError as error:
        raise OSError(
            f"{backbone.address} could not be downloaded to {backbone.cached}: {error}. Download it on a machine with "
            f"a network and copy it to {backbone.cached.parent}, or name it by --lpips-backbone FILE."
        ) from error
    except RuntimeError as error:
        # Of torch.hub for a wrong hash: a page of a proxy's, say, or a download that broke off.
        raise ValueError(
            f"What {backbone.address} gave is not {backbone.title}: {error}. It was thrown away. Try again, or "
            f"download it on another network and copy it to {backbone.cached.parent}."
        ) from error


def _is_whole(file: Path, net: str) -> bool:
    try:
        check_backbone(file, net)
    except (OSError, ValueError):
        return False
    return True

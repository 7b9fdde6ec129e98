"""Protocols: how a paper compared methods, so that ours can be compared in the same way, and what it measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from diffsparse.eval.model_choice import EMBEDDED


class PublishedRow(NamedTuple):
    """What a paper reports of a method on a model, against dense attention of the same paper."""

    method: str
    model: str
    psnr_db: float
    ssim: float
    lpips: float
    speed_up: float
    dense_seconds: float


@dataclass(frozen=True)
class Protocol:
    """What a paper fixes for one kind of model.

    Attributes:
        source: of the rows, and what in them is other than here.
        models: pattern of the names and pipeline classes that it is for.
        sparse: options that every sparse config has.
    """

    source: str
    models: str
    size: str
    frames: int
    sparse: Mapping[str, Any]
    rows: tuple[PublishedRow, ...]

    def agreed(self, option: str, fixed: Any, given: Any) -> Any:
        """The protocol's value of an option of the command.

        Raises:
            ValueError: another one is given.
        """
        if given is not None and given != fixed:
            raise ValueError(
                f"{option} {given} goes against --protocol scope, which has {fixed} for this model. Leave out one of "
                f"the two."
            )
        return fixed


SCOPE_SOURCE = (
    "SCOPE, Tables 1 and 2: one H200, the whole pipeline in bfloat16, against dense attention with the same prompts. "
    "Its prompts (Penguin), GPU, software and perhaps the network of its LPIPS are not those of this run"
)


def _rows(model: str, dense_seconds: float, **methods: tuple[float, float, float, float]) -> tuple[PublishedRow, ...]:
    return tuple(PublishedRow(method, model, *numbers, dense_seconds) for method, numbers in methods.items())


PROTOCOLS = {
    "scope-wan": Protocol(
        source=SCOPE_SOURCE,
        models=r"wan-?2\.[12](?!.*(i2v|vace|animate|s2v))|wanpipeline",
        size="1280x720",
        frames=81,
        sparse={"dense_steps": 0.2, "dense_layers": (0,)},
        rows=(
            *_rows(
                "Wan 2.1 14B",
                1913,
                SpargeAttn=(23.86, 0.791, 0.146, 1.48),
                SVG2=(24.63, 0.804, 0.127, 1.58),
                SVOO=(25.71, 0.831, 0.108, 1.71),
                SCOPE=(26.11, 0.844, 0.100, 1.76),
            ),
            *_rows(
                "Wan 2.2 A14B",
                1599,
                SpargeAttn=(24.37, 0.813, 0.123, 1.41),
                SVG2=(24.85, 0.829, 0.113, 1.54),
                SVOO=(25.42, 0.837, 0.102, 1.66),
                SCOPE=(26.01, 0.859, 0.095, 1.72),
            ),
        ),
    ),
    "scope-hunyuanvideo": Protocol(
        source=SCOPE_SOURCE,
        models=r"hunyuanvideo(?!.*(1\.?5|i2v|image|framepack))",
        size="1280x720",
        frames=129,
        sparse={"dense_steps": 0.1, "dense_layers": (0,)},
        rows=_rows(
            "HunyuanVideo",
            1801,
            SpargeAttn=(24.54, 0.809, 0.163, 1.50),
            SVG2=(27.41, 0.845, 0.107, 1.99),
            SVOO=(28.08, 0.871, 0.097, 1.82),
            SCOPE=(28.46, 0.878, 0.093, 1.99),
        ),
    ),
}
"""By the name that a run keeps. The rows are of text to video; the paper has image to video too, a run has not."""


def published_rows(protocol: str | None) -> list[dict[str, Any]]:
    """What was published of a run's protocol, each row with its source, ready for JSON; none without a protocol."""
    if protocol not in PROTOCOLS:
        return []
    return [row._asdict() | {"source": PROTOCOLS[protocol].source} for row in PROTOCOLS[protocol].rows]


def choose_protocol(model: str) -> str:
    """The name of SCOPE's protocol for a model, by its folder's pipeline class or by its name on the hub.

    Raises:
        ValueError: SCOPE measured no model of this kind.
    """
    known = _pipeline_class(Path(model)) or model.rpartition("/")[2]
    for name, protocol in PROTOCOLS.items():
        if model != EMBEDDED and re.match(protocol.models, known, re.IGNORECASE):
            return name
    raise ValueError(
        f"--protocol scope is for Wan 2.1, Wan 2.2 and HunyuanVideo, text to video; --model {model} is "
        f"{'the embedded one' if model == EMBEDDED else known}. Name one of them by --model, or leave --protocol out."
    )


def _pipeline_class(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    # What is wrong with a folder is said where it is chosen.
    except (OSError, ValueError, KeyError, TypeError):
        return None

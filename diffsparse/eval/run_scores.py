"""The scores of a run's videos against the dense ones, kept beside them so that they are computed once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffsparse.eval.comparison import compare, windows_of
from diffsparse.eval.json_shape import check_shape
from diffsparse.eval.lpips_metric import Lpips, NoLpips
from diffsparse.eval.named_config import DENSE
from diffsparse.eval.output_file import write_json
from diffsparse.eval.run_folder import Pair, RunFolder

SCORES_VERSION = 2
"""Raised when a metric changes or one is added: scores of older versions are computed again."""

_OF_METRIC = {"mean": (float, str), "worst": (float, str), "worst_frame": int, "per_frame": [(float, str)]}
_SCORES = dict.fromkeys(("psnr_db", "ssim", "ms_ssim", "lpips", "flicker"), (_OF_METRIC, str))
SHAPE = {"version": int, "of": list, "scores": {"num_frames": int, "lpips_net": str} | _SCORES}
"""What a file of scores must have; one that has not is damaged, and computed again."""


def scores_of(folder: RunFolder, config: str, pair: Pair, lpips: Lpips | NoLpips) -> dict[str, Any]:
    """How close a config's video is to the dense one: `Comparison.as_dict`, computed from the stored frames.

    Raises:
        ValueError: the frames cannot be read.
    """
    file = folder.path / config / f"{pair.name}.scores.json"
    of = [(folder.record(name, pair) or {}).get("sha256") for name in (DENSE, config)]
    kept = _read(file)
    if kept.get("version") == SCORES_VERSION and kept.get("of") == of:
        scores: dict[str, Any] = kept["scores"]
        is_scored = scores["lpips_net"] == lpips.net and not isinstance(scores["lpips"], str)
        # Why LPIPS is missing may be another reason by now, or none.
        if isinstance(lpips, NoLpips) and not is_scored:
            return scores | {"lpips": lpips.reason, "lpips_net": lpips.net}
        if is_scored:
            return scores
    scores = compare(windows_of(folder.frames(DENSE, pair), folder.frames(config, pair)), lpips).as_dict()
    write_json(file, {"version": SCORES_VERSION, "of": of, "scores": scores})
    return scores


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        check_shape(found, SHAPE, "it")
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
    return found

"""What a report says, as plain data: `report.json`, from which the page and the tables are made."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsparse.eval.json_shape import check_shape
from diffsparse.eval.lpips_metric import Lpips, NoLpips
from diffsparse.eval.named_config import DENSE
from diffsparse.eval.output_file import reading
from diffsparse.eval.paired_statistics import bootstrap_interval, of_differences
from diffsparse.eval.protocol import published_rows
from diffsparse.eval.run_folder import MANIFEST, Pair, RunFolder, read_manifest
from diffsparse.eval.run_scores import scores_of


@dataclass(frozen=True)
class Metric:
    """How a metric is shown."""

    label: str
    digits: str
    higher_is_better: bool


METRICS = {
    "psnr_db": Metric("PSNR, dB", ".2f", higher_is_better=True),
    "ssim": Metric("SSIM", ".4f", higher_is_better=True),
    "ms_ssim": Metric("MS-SSIM", ".4f", higher_is_better=True),
    "lpips": Metric("LPIPS", ".4f", higher_is_better=False),
    "flicker": Metric("flicker", ".4f", higher_is_better=False),
}

MEANS = (
    *("seconds", "seconds_per_step", "dense_seconds", "attention_seconds", "dense_attention_seconds"),
    *("speed_up", "speed_up_steps", "density", "overall_density"),
)
LARGEST = ("peak_memory_bytes", "dense_peak_memory_bytes")
"""What a config has of its videos: the mean over those that have it, and the largest."""

_DENSITIES = {"density": (float, None), "overall_density": (float, None)}
_TRANSFORMER = _DENSITIES | {
    "name": str,
    "family": (str, None),
    "num_layers": int,
    "num_heads": int,
    "sparse_calls": int,
    "dense_calls": int,
    "dense_reasons": {str: int},
    "head_classes": [[str]],
    "head_densities": [[float]],
}
_MADE_BY = {"command": str, "device": str, "machine": dict, "versions": dict, "git_revision": (str, None)}
_SAMPLING = {"width": int, "height": int, "num_frames": int, "num_inference_steps": int, "fps": float}
NEEDED = {
    "settings": {"model_sha256": (str, None), "protocol": (str, None), "sampling": _SAMPLING},
    "made_by": [_MADE_BY],
}
"""What a report needs of a manifest besides what each has."""

DENSE_RECORD = {
    "total_seconds": float,
    "seconds_per_step": float,
    "peak_memory_bytes": (float, None),
    "peak_memory_kind": str,
    "process": str,
}
RECORD = DENSE_RECORD | {"attention": _DENSITIES | {"transformers": [_TRANSFORMER]}}
"""What a report needs of the record of a video."""
FEWEST_SECONDS = 1e-9
"""No clock measures less: what a record has below it would make speed-ups that no float holds."""


def collect(runs: list[Path], lpips: Lpips | NoLpips) -> dict[str, Any]:
    """All of some runs, ready for JSON; what is missing is listed with why, as far as it is known.

    Raises:
        ValueError: a folder that is no run.
    """
    data: dict[str, Any] = {"lpips_net": lpips.net, "runs": [], "configs": [], "videos": []}
    data |= {"missing": [], "differences": [], "published": []}
    for index, path in enumerate(runs):
        manifest = read_manifest(path)
        # Runs of earlier versions know of no protocol.
        settings = {"protocol": None} | manifest["settings"]
        with reading(f"{path / MANIFEST} is damaged", "Name another folder."):
            check_shape(manifest | {"settings": settings}, NEEDED, "it")
        data["runs"].append({"path": str(path)} | manifest)
        videos, missing = _videos(index, RunFolder(path), manifest["settings"], lpips)
        data["videos"] += videos
        data["missing"] += missing
        configs = [
            _summary(index, name, config, [video for video in videos if video["config"] == name])
            for name, config in sorted(manifest["settings"]["configs"].items())
        ]
        data["configs"] += configs
        data["differences"] += _differences(index, [config["name"] for config in configs], videos)
    # Runs that follow the same protocol share its rows.
    for name in dict.fromkeys(run["settings"].get("protocol") for run in data["runs"]):
        data["published"] += published_rows(name)
    return data


def _videos(
    run: int, folder: RunFolder, settings: dict[str, Any], lpips: Lpips | NoLpips
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    videos, missing = [], []
    for prompt, text in enumerate(settings["prompts"]):
        for seed in settings["seeds"]:
            pair = Pair(prompt, seed)
            why_no_dense = _why_missing(folder, DENSE, pair)
            for name in sorted(settings["configs"]):
                where = {"run": run, "config": name, "prompt_index": prompt, "prompt": text, "seed": seed}
                if (reason := _why_missing(folder, name, pair) or why_no_dense) is not None:
                    missing.append(where | {"reason": reason})
                    continue
                dense, record = folder.record(DENSE, pair), folder.record(name, pair)
                assert dense is not None
                assert record is not None
                scores = scores_of(folder, name, pair, lpips)
                videos.append(where | _video(dense, record) | {"scores": scores})
    return videos, missing


def _why_missing(folder: RunFolder, name: str, pair: Pair) -> str | None:
    record = folder.record(name, pair)
    if record is None:
        return folder.failure(name, pair) or f"the {name} video is not made yet"
    if folder.is_whole(name, pair):
        return _why_damaged(folder, name, pair, record)
    return f"the frames of the {name} video are not those that were made: the run's own command makes it anew"


def _why_damaged(folder: RunFolder, name: str, pair: Pair, record: dict[str, Any]) -> str | None:
    try:
        # Runs of earlier versions have not counted the seconds in attention.
        found = {"attention_seconds": None} | record
        check_shape(found, {"attention_seconds": (float, None)} | (DENSE_RECORD if name == DENSE else RECORD), "it")
        for key in ("total_seconds", "seconds_per_step"):
            if record[key] < FEWEST_SECONDS:
                raise TypeError(f"it.{key} is {record[key]}")
        for index, each in enumerate([] if name == DENSE else record["attention"]["transformers"]):
            layers, heads = each["num_layers"], each["num_heads"]
            for key in ("head_classes", "head_densities"):
                if len(each[key]) != layers or any(len(row) != heads for row in each[key]):
                    raise TypeError(f"it.attention.transformers[{index}].{key} is not of {layers} x {heads}")
    except TypeError as error:
        return f"{folder.record_file(name, pair)} is damaged ({error}): remove it, and the run's own command goes on"
    return None


def _video(dense: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    attention = record["attention"]
    # Another process ran at another time, beside something else: times of the two say nothing of the config.
    comparable = dense["process"] == record["process"]
    return {
        "seconds": record["total_seconds"],
        "seconds_per_step": record["seconds_per_step"],
        "dense_seconds": dense["total_seconds"],
        "dense_seconds_per_step": dense["seconds_per_step"],
        # Runs of earlier versions have not counted them.
        "attention_seconds": record.get("attention_seconds"),
        "dense_attention_seconds": dense.get("attention_seconds"),
        "speed_up": dense["total_seconds"] / record["total_seconds"] if comparable else None,
        "speed_up_steps": dense["seconds_per_step"] / record["seconds_per_step"] if comparable else None,
        "density": attention["density"],
        "overall_density": attention["overall_density"],
        "dense_reasons": _reasons(attention["transformers"]),
        "peak_memory_bytes": record["peak_memory_bytes"],
        "dense_peak_memory_bytes": dense["peak_memory_bytes"],
        "peak_memory_kind": record["peak_memory_kind"],
        "attention": attention,
    }


def _summary(run: int, name: str, config: dict[str, str], videos: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "run": run,
        "name": name,
        "text": config["text"],
        "config": config["config"],
        "num_videos": len(videos),
        "scores": {key: _of_metric(key, videos) for key in METRICS},
        **{key: _mean(video[key] for video in videos) for key in MEANS},
        "speed_up_interval": bootstrap_interval([v["speed_up"] for v in videos if v["speed_up"] is not None]),
        **{key: max((video[key] for video in videos if video[key]), default=None) for key in LARGEST},
        "dense_reasons": _reasons(videos),
    }


def _reasons(counted: list[dict[str, Any]]) -> dict[str, int]:
    """The dense calls of transformers or of videos together, by reason."""
    return dict(sum((Counter(each["dense_reasons"]) for each in counted), Counter[str]()))


def _of_metric(key: str, videos: list[dict[str, Any]]) -> dict[str, Any] | str:
    """Mean over the videos with its interval, and the worst frame of all; or why there is none."""
    scores = [video["scores"][key] for video in videos]
    if not scores:
        return "n/a: no video is made yet"
    reason = next((score for score in scores if isinstance(score, str)), None)
    if reason is not None:
        return reason
    worst = (max, min)[METRICS[key].higher_is_better](scores, key=lambda score: as_number(score["worst"]))
    means = [as_number(score["mean"]) for score in scores]
    finite = [mean for mean in means if math.isfinite(mean)]
    video = videos[scores.index(worst)]
    return {
        "mean": statistics.fmean(finite) if finite else "infinite",
        "interval": bootstrap_interval(finite),
        "worst": worst["worst"],
        "worst_of": {"prompt_index": video["prompt_index"], "seed": video["seed"], "frame": worst["worst_frame"]},
        "num_identical": len(means) - len(finite),
    }


def _differences(run: int, names: list[str], videos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each two configs and each metric: by how much the first is better on the same prompt and seed."""
    found = []
    for first, second in itertools.combinations(names, 2):
        for key, metric in METRICS.items():
            of_first, of_second = (finite_means(videos, name, key) for name in (first, second))
            differences = [of_first[video] - of_second[video] for video in of_first if video in of_second]
            if differences:
                found.append(
                    {
                        "run": run,
                        "first": first,
                        "second": second,
                        "metric": key,
                        "higher_is_better": metric.higher_is_better,
                        **of_differences(differences),
                    }
                )
    return found


def finite_means(videos: list[dict[str, Any]], config: str, key: str) -> dict[tuple[str, int], float]:
    """A metric or another number, such as `speed_up`, of a config's videos by prompt and seed, where it is finite."""
    found = {}
    for video in videos:
        score = video["scores"][key] if key in METRICS else video[key]
        mean = score["mean"] if isinstance(score, dict) else score
        if video["config"] == config and mean is not None and math.isfinite(as_number(mean)):
            found[video["prompt"], video["seed"]] = float(mean)
    return found


def as_number(score: float | str) -> float:
    """A score out of JSON, where infinity and what is not a number are words."""
    if isinstance(score, str):
        return math.inf if score == "infinite" else math.nan
    return score


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None

"""What a report says, as plain data: `report.json`, from which the page and the tables are made."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsparse.eval.lpips_metric import Lpips, NoLpips
from diffsparse.eval.named_config import DENSE
from diffsparse.eval.paired_statistics import bootstrap_interval, of_differences
from diffsparse.eval.protocol import published_rows
from diffsparse.eval.run_folder import Pair, RunFolder, read_manifest
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


def collect(runs: list[Path], lpips: Lpips | NoLpips) -> dict[str, Any]:
    """All of some runs, ready for JSON; what is missing is listed with why, as far as it is known.

    Raises:
        ValueError: a folder that is no run.
    """
    data: dict[str, Any] = {"lpips_net": lpips.net, "runs": [], "configs": [], "videos": []}
    data |= {"missing": [], "differences": [], "published": []}
    for index, path in enumerate(runs):
        manifest = read_manifest(path)
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
            dense = folder.record(DENSE, pair)
            for name in sorted(settings["configs"]):
                record = folder.record(name, pair)
                where = {"run": run, "config": name, "prompt_index": prompt, "prompt": text, "seed": seed}
                if dense is None or record is None:
                    lacking = name if record is None else DENSE
                    reason = folder.failure(lacking, pair) or f"the {lacking} video is not made yet"
                    missing.append(where | {"reason": reason})
                else:
                    scores = scores_of(folder, name, pair, lpips)
                    videos.append(where | _video(dense, record) | {"scores": scores})
    return videos, missing


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
    comparable = [video for video in videos if video["speed_up"] is not None]
    return {
        "run": run,
        "name": name,
        "text": config["text"],
        "config": config["config"],
        "num_videos": len(videos),
        "scores": {key: _of_metric(key, videos) for key in METRICS},
        "seconds": _mean(video["seconds"] for video in videos),
        "seconds_per_step": _mean(video["seconds_per_step"] for video in videos),
        "dense_seconds": _mean(video["dense_seconds"] for video in videos),
        "attention_seconds": _mean(video["attention_seconds"] for video in videos),
        "dense_attention_seconds": _mean(video["dense_attention_seconds"] for video in videos),
        "speed_up": _mean(video["speed_up"] for video in comparable),
        "speed_up_interval": bootstrap_interval([video["speed_up"] for video in comparable]),
        "speed_up_steps": _mean(video["speed_up_steps"] for video in comparable),
        "density": _mean(video["density"] for video in videos),
        "overall_density": _mean(video["overall_density"] for video in videos),
        "peak_memory_bytes": max((v["peak_memory_bytes"] for v in videos if v["peak_memory_bytes"]), default=None),
        "dense_peak_memory_bytes": max(
            (v["dense_peak_memory_bytes"] for v in videos if v["dense_peak_memory_bytes"]), default=None
        ),
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
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            for key, metric in METRICS.items():
                of = {name: _means(name, key, videos) for name in (first, second)}
                both = [pair for pair in of[first] if pair in of[second]]
                differences = [of[first][pair] - of[second][pair] for pair in both]
                if not differences:
                    continue
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


def _means(name: str, key: str, videos: list[dict[str, Any]]) -> dict[tuple[int, int], float]:
    """The finite means of a config's videos, by prompt and seed."""
    scores = {(v["prompt_index"], v["seed"]): v["scores"][key] for v in videos if v["config"] == name}
    means = {pair: as_number(score["mean"]) for pair, score in scores.items() if not isinstance(score, str)}
    return {pair: mean for pair, mean in means.items() if math.isfinite(mean)}


def as_number(score: float | str) -> float:
    """A score out of JSON, where infinity and what is not a number are words."""
    if isinstance(score, str):
        return math.inf if score == "infinite" else math.nan
    return score


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None

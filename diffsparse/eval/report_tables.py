"""The headline of a report as rows of text, the same on the page, in Markdown and on the terminal."""

from __future__ import annotations

import math
from typing import Any

from diffsparse.eval.report_data import METRICS, as_number


def headline(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each config: mean [95 % interval], worst frame."""
    headings = ["config", "videos", *metric_labels(data["lpips_net"]).values()]
    headings += ["seconds a video", "in attention", "speed-up", "density", "peak memory"]
    return headings, [_row(data, config) for config in data["configs"]]


def published(data: dict[str, Any], mark: str = ": published, not measured here") -> list[list[str]]:
    """Rows for the same headings: what papers report whose protocol a run follows, `mark` after each name."""
    rows = []
    for of in data["published"]:
        # To as many digits as the paper has.
        scores = {"psnr_db": f"{of['psnr_db']:.2f}", "ssim": f"{of['ssim']:.3f}", "lpips": f"{of['lpips']:.3f}"}
        cells = [scores.get(key, "n/a") for key in METRICS]
        seconds = f"n/a (dense {of['dense_seconds']:.0f})"
        name = f"{of['method']} on {of['model']}{mark}"
        rows.append([name, "n/a", *cells, seconds, "n/a", f"{of['speed_up']:.2f}×", "n/a", "n/a"])
    return rows


def filled(headings: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The same without the columns in which no row has anything."""
    there = [place for place in range(len(headings)) if any(row[place] != "n/a" for row in rows)]
    return [headings[place] for place in there], [[row[place] for place in there] for row in rows]


def differences(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each two configs and each metric."""
    rows, labels = [], metric_labels(data["lpips_net"])
    for row in data["differences"]:
        metric = METRICS[row["metric"]]
        first, second = (label(data, row["run"], row[place]) for place in ("first", "second"))
        better = first if (row["mean"] > 0) == row["higher_is_better"] else second
        chance = "" if row["sign_test"] < 0.05 else " (may be chance)"
        rows.append(
            [
                f"{first} − {second}",
                labels[row["metric"]],
                f"{row['mean']:+{metric.digits}}{_interval(row['interval'], '+' + metric.digits)}",
                "neither" if row["mean"] == 0 else f"{better}{chance}",
                f"{row['sign_test']:.3f}",
                str(row["num_pairs"]),
            ]
        )
    return ["on the same prompts and seeds", "metric", "mean difference", "better", "sign test, p", "videos"], rows


def notes(data: dict[str, Any]) -> list[str]:
    """What a reader of the rows has to know besides."""
    labels = metric_labels(data["lpips_net"])
    found = [f"{labels[key]} {reason}." for key, reason in _reasons(data).items()]
    found += [f"Published, not measured here: {source}." for source in {row["source"]: 0 for row in data["published"]}]
    for config in data["configs"]:
        name = label(data, config["run"], config["name"])
        psnr = config["scores"]["psnr_db"]
        if not isinstance(psnr, str) and psnr["num_identical"]:
            count = psnr["num_identical"]
            equal = "1 video equals the dense one" if count == 1 else f"{count} videos equal the dense ones"
            found.append(f"{name}: {equal}, left out of the mean PSNR.")
        kind = data["runs"][config["run"]]["settings"]["configs"][config["name"]].get("kind", "sparse attention")
        if "sparse attention" not in kind:
            found.append(f"{name}: {kind}; nothing sparse ran.")
        elif config["num_videos"] and config["density"] is None:
            found.append(f"{name}: sparse attention never ran; {_counts(config['dense_reasons'])}.")
        elif config["dense_reasons"]:
            found.append(f"{name}: attention calls that were left dense: {_counts(config['dense_reasons'])}.")
        if config["num_videos"] and config["speed_up"] is None:
            found.append(f"{name}: no speed-up, since dense and sparse videos were made by different processes.")
    if data["missing"]:
        found.append(f"Videos that are missing: {len(data['missing'])}. The report is of those that are there.")
    return found


def label(data: dict[str, Any], run: int, config: str) -> str:
    """A config of a run as the user named it, with its run where there are several."""
    of_run = data["runs"][run]
    text: str = of_run["settings"]["configs"][config]["text"]
    return text if len(data["runs"]) == 1 else f"{of_run['path']}: {text}"


def metric_labels(lpips_net: str) -> dict[str, str]:
    """What each of `METRICS` is called in a heading: LPIPS with the net that it judges by."""
    return {key: metric.label for key, metric in METRICS.items()} | {"lpips": f"{METRICS['lpips'].label}, {lpips_net}"}


def number(value: float | str | None, digits: str) -> str:
    """A score in words."""
    if value is None:
        return "n/a"
    value = as_number(value)
    if math.isnan(value):
        return "not a number"
    return "∞ (equal)" if math.isinf(value) else format(value, digits)


def _row(data: dict[str, Any], config: dict[str, Any]) -> list[str]:
    row = [label(data, config["run"], config["name"]), str(config["num_videos"])]
    for key, metric in METRICS.items():
        score = config["scores"][key]
        if isinstance(score, str):
            row.append("n/a")
        else:
            worst = f"worst frame {number(score['worst'], metric.digits)}"
            row.append(f"{number(score['mean'], metric.digits)}{_interval(score['interval'], metric.digits)}, {worst}")
    seconds = [_seconds(config[f"{kind}seconds"], config[f"dense_{kind}seconds"]) for kind in ("", "attention_")]
    memory = f"{_gigabytes(config['peak_memory_bytes'])} (dense {_gigabytes(config['dense_peak_memory_bytes'])})"
    times = number(config["speed_up"], ".2f")
    speed_up = times if config["speed_up"] is None else f"{times}×{_interval(config['speed_up_interval'], '.2f')}"
    return [*row, *seconds, speed_up, percent(config["overall_density"]), memory]


def percent(share: float | None) -> str:
    """A density in words."""
    return "n/a" if share is None else f"{100 * share:.0f} %"


def _seconds(sparse: float | None, dense: float | None) -> str:
    return "n/a" if sparse is None else f"{sparse:.1f} (dense {number(dense, '.1f')})"


def _reasons(data: dict[str, Any]) -> dict[str, str]:
    scores = [config["scores"] for config in data["configs"]]
    return {key: s[key] for s in scores for key in METRICS if isinstance(s[key], str)}


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} for “{reason}”" for reason, count in reasons.items()) or "nothing was counted"


def _interval(interval: tuple[float, float] | None, digits: str) -> str:
    return "" if interval is None else f" [{interval[0]:{digits}}, {interval[1]:{digits}}]"


def _gigabytes(count: int | None) -> str:
    return "n/a" if count is None else f"{count / 1e9:.2f} GB"

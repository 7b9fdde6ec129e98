"""A report as one HTML page that needs nothing else."""

from __future__ import annotations

import json
import math
from typing import Any

from diffsparse.eval.html_page import data_uri, fact_list, html_page, sorted_cell, sorting_heads, text
from diffsparse.eval.pareto_plot import Point, pareto_svg
from diffsparse.eval.report_clips import Clip
from diffsparse.eval.report_data import METRICS, as_number
from diffsparse.eval.report_player import player
from diffsparse.eval.report_tables import (
    differences,
    filled,
    headline,
    label,
    metric_labels,
    notes,
    number,
    percent,
    published,
)


def as_page(
    data: dict[str, Any], clips: list[Clip], left_out: list[dict[str, Any]], head_pictures: dict[str, bytes]
) -> str:
    """The page; head_pictures are PNGs by what stands under them."""
    headings, rows = headline(data)
    body = [
        "<h1>Sparse against dense attention</h1>",
        *_introduction(data),
        _table(*_what_matters_first(headings, rows + published(data)), first="config"),
        '<p class="dim">Mean over the videos [95 % interval of the mean, by bootstrap]. Each video is compared with '
        "the dense one of the same prompt and seed. PSNR and the SSIMs: higher is closer. LPIPS and flicker "
        "(changes from frame to frame that differ): lower is closer. Density: "
        "share of the attention that was computed exactly, dense steps included.</p>",
        "<ul>",
        *(f"<li>{text(note)}</li>" for note in notes(data)),
        "</ul>",
        *_pareto(data),
        *_differences(data),
        *player(data, clips, left_out),
        *_videos(data, clips),
        *_missing(data),
        *_heads(head_pictures),
        *_origin(data),
    ]
    return html_page("diffsparse: sparse against dense", body, own="report")


def _what_matters_first(headings: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The gain beside the name, where a narrow screen shows it; no column without any number, as the notes say why."""
    headings, rows = filled(headings, rows)
    first = {heading: place for place, heading in enumerate(["config", "speed-up", "density"])}
    order = sorted(range(len(headings)), key=lambda place: first.get(headings[place], len(first)))
    return [headings[place] for place in order], [[row[place] for place in order] for row in rows]


def _introduction(data: dict[str, Any]) -> list[str]:
    lines = []
    for index, run in enumerate(data["runs"]):
        settings = run["settings"]
        sampling = settings["sampling"]
        # Of the videos themselves: a pipeline may have rounded what was asked for.
        lengths = dict.fromkeys(v["scores"]["num_frames"] for v in data["videos"] if v["run"] == index)
        num_frames = ", ".join(map(str, lengths)) or sampling["num_frames"]
        devices = dict.fromkeys(made["device"] for made in run["made_by"])
        lines.append(
            f'<p class="dim">{text(settings["model"])}: {_count(settings["prompts"], "prompt")}, '
            f"{_count(settings['seeds'], 'seed')}, {sampling['width']} × {sampling['height']}, {num_frames} "
            f"frames, {sampling['num_inference_steps']} steps, on {text(', '.join(devices))}.</p>"
        )
    return lines


def _count(things: list[Any], of_what: str) -> str:
    return f"{len(things)} {of_what}{'s' if len(things) != 1 else ''}"


def _pareto(data: dict[str, Any]) -> list[str]:
    points = []
    for config in data["configs"]:
        psnr = config["scores"]["psnr_db"]
        if config["speed_up"] is not None and not isinstance(psnr, str) and math.isfinite(as_number(psnr["mean"])):
            points.append(
                Point(label(data, config["run"], config["name"]), config["speed_up"], psnr["mean"], psnr["interval"])
            )
    if not points:
        return []
    return [
        "<h2>Speed against quality</h2><figure>",
        f'<div class="scroll">{pareto_svg(points)}</div>',
        "<figcaption>Up and to the right is better. The bars are the intervals of the mean; the dashed line joins the "
        "configs that no other beats in both.</figcaption></figure>",
    ]


def _differences(data: dict[str, Any]) -> list[str]:
    headings, rows = differences(data)
    if not rows:
        return []
    return [
        "<h2>Config against config</h2>",
        _table(headings, rows, first="config"),
        '<p class="dim">Of each prompt and seed, the first config’s score less the second’s. A p below 0.05 would be '
        "rare if neither were better; with fewer than six videos it cannot be that small.</p>",
    ]


def _videos(data: dict[str, Any], clips: list[Clip]) -> list[str]:
    # Of a metric that no video has, the notes say why.
    shown = [key for key in METRICS if any(not isinstance(video["scores"][key], str) for video in data["videos"])]
    labels = metric_labels(data["lpips_net"])
    has_attention = any(video["attention_seconds"] is not None for video in data["videos"])
    headings = ["", "prompt", "seed", "config", *(labels[key] for key in shown), "seconds"]
    headings += ["in attention"] * has_attention + ["speed-up", "density"]
    place = {id(clip.video): index for index, clip in enumerate(clips)}
    rows = []
    for video in data["videos"]:
        index, name = place.get(id(video)), label(data, video["run"], video["config"])
        cells = [
            "<td></td>" if index is None else f'<td><button data-clip="{index}">look</button></td>',
            sorted_cell(video["prompt"], video["prompt"], "prompt"),
            sorted_cell(str(video["seed"]), video["seed"]),
            sorted_cell(name, name, "config"),
        ]
        for key in shown:
            metric, score = METRICS[key], video["scores"][key]
            if isinstance(score, str):
                cells.append(sorted_cell("n/a", None))
            else:
                worst = f"frame {score['worst_frame']}: {number(score['worst'], metric.digits)}"
                mean = number(score["mean"], metric.digits)
                cells.append(sorted_cell(mean, as_number(score["mean"]), "number", worst))
        for kind in ["", "attention_"][: 1 + has_attention]:
            sparse, dense = video[f"{kind}seconds"], video[f"dense_{kind}seconds"]
            cells.append(sorted_cell(number(sparse, ".1f"), sparse, "number", f"dense {number(dense, '.1f')}"))
        cells += [
            sorted_cell(number(video["speed_up"], ".2f"), video["speed_up"]),
            sorted_cell(percent(video["overall_density"]), video["overall_density"]),
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return [
        "<h2>Every video</h2>",
        '<p class="dim">A click on a heading sorts. Under a score: its worst frame.</p>',
        f'<div class="scroll"><table id="videos"><thead>{sorting_heads(headings)}</thead><tbody>',
        *rows,
        "</tbody></table></div>",
    ]


def _missing(data: dict[str, Any]) -> list[str]:
    if not data["missing"]:
        return []
    rows = [[v["prompt"], str(v["seed"]), label(data, v["run"], v["config"]), v["reason"]] for v in data["missing"]]
    return ["<h2>Missing</h2>", _table(["prompt", "seed", "config", "why"], rows)]


def _heads(pictures: dict[str, bytes]) -> list[str]:
    if not pictures:
        return []
    lines = ["<h2>What the heads do</h2>"]
    for caption, png in pictures.items():
        lines.append(
            f'<figure><img src="{data_uri("image/png", png)}" alt="Classes of the attention heads">'
            f"<figcaption>{text(caption)}</figcaption></figure>"
        )
    return lines


def _origin(data: dict[str, Any]) -> list[str]:
    lines = ["<h2>How it was made</h2>"]
    for run in data["runs"]:
        lines.append(f"<p>{text(run['path'])}</p>" if len(data["runs"]) > 1 else "")
        for made in run["made_by"]:
            facts = made["machine"] | made["versions"] | {"revision of diffsparse": made["git_revision"] or "unknown"}
            lines += [f"<pre>{text(made['command'])}</pre>", fact_list(facts)]
        lines.append("<h2>Configs in full</h2>")
        lines.append(fact_list({c["text"]: c["config"] for c in run["settings"]["configs"].values()}))
        settings = run["settings"]
        fingerprint = settings["model_sha256"] or "unknown"
        lines.append(fact_list({"sampling": json.dumps(settings["sampling"]), "fingerprint of the model": fingerprint}))
    return lines


def _table(headings: list[str], rows: list[list[str]], first: str = "") -> str:
    heads = "".join(f"<th>{text(heading)}</th>" for heading in headings)
    body = []
    for row in rows:
        cells = [f'<td class="{first}">{text(row[0])}</td>', *(f"<td>{_split(cell)}</td>" for cell in row[1:])]
        body.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _split(cell: str) -> str:
    """A number, and smaller below it what is in brackets or after it."""
    for mark in (" [", " (", ", worst"):
        if mark in cell:
            start, rest = cell.split(mark, 1)
            lines = (mark.strip(", ") + rest).replace("], worst", "]\nworst").splitlines()
            return text(start) + "".join(f'<span class="range">{text(line)}</span>' for line in lines)
    return text(cell)

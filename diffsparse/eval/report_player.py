"""The player on the page of a report: dense and sparse in step, under a wipe, or the error of each pixel."""

from __future__ import annotations

from typing import Any

from diffsparse.eval.html_page import data_block, text
from diffsparse.eval.report_clips import BRIGHTEST_ERROR, Clip
from diffsparse.eval.report_tables import label, number, percent


def player(data: dict[str, Any], clips: list[Clip], left_out: list[dict[str, Any]]) -> list[str]:
    """Part of a page; nothing without a clip. `left_out` are the videos for which there was no room."""
    if not clips:
        return []
    options = [f'<option value="{index}">{text(_title(data, clip.video))}</option>' for index, clip in enumerate(clips)]
    contents = [
        {
            "uri": clip.uri,
            "width": clip.pane_width,
            "height": clip.pane_height,
            "frames": clip.num_frames,
            "fps": clip.fps,
            "about": _about(data, clip.video),
        }
        for clip in clips
    ]
    more = "" if not left_out else f" {len(left_out)} more would make the page too large: see the run’s folder."
    return [
        "<h2>Look at them</h2>",
        "<noscript><p>The player and the sorting of the table need JavaScript.</p></noscript>",
        '<div class="player">',
        f'<div><select data-role="clip" aria-label="video">{"".join(options)}</select></div>',
        '<div><button data-mode="side">side by side</button><button data-mode="wipe">wipe</button>'
        '<button data-mode="error">error map</button></div>',
        '<div class="titles" data-for="side wipe"><span>dense</span><span>sparse</span></div>',
        '<canvas data-role="canvas"></canvas>',
        '<div data-for="wipe">dense <input type="range" data-role="wipe" aria-label="wipe" min="0" max="100" '
        'value="50"> sparse</div>',
        f'<p class="dim" data-for="error">Mean error of red, green and blue: black is none, yellow '
        f"{100 * BRIGHTEST_ERROR:.0f} % of the full range or more.</p>",
        '<div><button data-role="play">play</button><button data-role="back" aria-label="frame back">‹</button>'
        '<button data-role="on" aria-label="frame on">›</button>'
        '<input type="range" data-role="place" aria-label="frame" min="0" value="0">'
        '<span data-role="frame"></span></div>',
        '<p class="dim" data-role="about"></p>',
        "</div>",
        '<p class="dim">Worst first. Compressed and scaled for this page; the numbers are of the stored frames.'
        f"{more}</p>",
        data_block("clips", contents),
    ]


def _title(data: dict[str, Any], video: dict[str, Any]) -> str:
    psnr = number(video["scores"]["psnr_db"]["mean"], ".1f")
    name = label(data, video["run"], video["config"])
    return f"PSNR {psnr} dB, {name}, seed {video['seed']}: {video['prompt']}"


def _about(data: dict[str, Any], video: dict[str, Any]) -> str:
    density = video["overall_density"]
    computed = "" if density is None else f", with {percent(density)} of the attention computed"
    return (
        f"“{video['prompt']}”, seed {video['seed']}: dense in {video['dense_seconds']:.1f} s; by "
        f"{label(data, video['run'], video['config'])} in {video['seconds']:.1f} s{computed}."
    )

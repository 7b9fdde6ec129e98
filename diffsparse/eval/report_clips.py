"""Videos small enough to lie inside a page: dense, sparse and their difference side by side in one file, so in step."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffsparse.eval.html_page import data_uri
from diffsparse.eval.named_config import DENSE
from diffsparse.eval.report_data import as_number
from diffsparse.eval.run_folder import Pair, RunFolder
from diffsparse.eval.video_io import Image, read_frames, write_video

LARGEST_PANE, SMALLEST_PANE = 480, 256
"""Width of each of the three in pixels: larger videos are made smaller, tiny ones larger."""

BRIGHTEST_ERROR = 0.1
"""The mean error of R, G and B that the map shows as its brightest colour; 1 is white against black."""


@dataclass(frozen=True)
class Clip:
    """A video of three panes beside each other: dense, sparse, error; as a data URI."""

    video: dict[str, Any]
    uri: str
    pane_width: int
    pane_height: int
    num_frames: int
    fps: float


def make_clips(data: dict[str, Any], largest_bytes: float) -> tuple[list[Clip], list[dict[str, Any]]]:
    """Clips of a report's videos as far as they fit, and the videos left out.

    The worst video of each config comes first, by PSNR, then the others, worst first.
    """
    ordered = sorted(data["videos"], key=lambda video: as_number(video["scores"]["psnr_db"]["mean"]))
    worst: dict[tuple[int, str], dict[str, Any]] = {}
    for video in ordered:
        worst.setdefault((video["run"], video["config"]), video)
    others = (video for video in ordered if video is not worst[video["run"], video["config"]])
    clips: list[Clip] = []
    left_out: list[dict[str, Any]] = []
    room = largest_bytes
    for video in [*worst.values(), *others]:
        # What follows a clip that did not fit would not be the worst that is left.
        clip = None if left_out else make_clip(data["runs"][video["run"]], video)
        if clip is None or len(clip.uri) > room:
            left_out.append(video)
        else:
            clips.append(clip)
            room -= len(clip.uri)
    return clips, left_out


def make_clip(run: dict[str, Any], video: dict[str, Any]) -> Clip:
    """The clip of one video of a run."""
    folder, pair = RunFolder(Path(run["path"])), Pair(video["prompt_index"], video["seed"])
    frames = zip(read_frames(folder.frames(DENSE, pair)), read_frames(folder.frames(video["config"], pair)))
    panes = np.stack([three_panes(dense, sparse) for dense, sparse in frames])
    fps = run["settings"]["sampling"]["fps"]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "clip.mp4"
        write_video(file, panes, fps)
        uri = data_uri("video/mp4", file.read_bytes())
    return Clip(video, uri, panes.shape[2] // 3, panes.shape[1], len(panes), fps)


def three_panes(dense: Image, sparse: Image) -> Image:
    """Two pictures [H, W, 3] and the map of their difference, beside each other, each of even size."""
    return np.concatenate([_resized(pane) for pane in (dense, sparse, error_map(dense, sparse))], axis=1)


def error_map(dense: Image, sparse: Image) -> Image:
    """The mean error of R, G and B at every pixel, as a colour [H, W, 3]: black for none, yellow for much."""
    import matplotlib

    error: NDArray[np.float64] = np.abs(dense.astype(np.float64) - sparse).mean(axis=-1) / 255
    colours = matplotlib.colormaps["inferno"](np.clip(error / BRIGHTEST_ERROR, 0, 1), bytes=True)
    return np.asarray(colours[..., :3], dtype=np.uint8)


def _resized(picture: Image) -> Image:
    import PIL.Image

    height, width = picture.shape[:2]
    factor = -(-SMALLEST_PANE // width) if width < SMALLEST_PANE else min(1.0, LARGEST_PANE / width)
    size = [max(2, 2 * round(side * factor / 2)) for side in (width, height)]
    kind = PIL.Image.Resampling.NEAREST if factor >= 1 else PIL.Image.Resampling.BOX
    return np.asarray(PIL.Image.fromarray(picture).resize((size[0], size[1]), kind))

"""Reading and writing videos: video files, or folders with one image a frame. Written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffsparse.whole_file import unfinished_name, whole_file

Image = NDArray[np.uint8]
"""One picture [H, W, 3]."""

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


def read_frames(path: Path) -> Iterator[Image]:
    """The frames [H, W, 3] of a video file, or of a folder of images in the order of the numbers in their names.

    Only one frame is held at a time.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is no video, a damaged one, or a folder without images.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    return _read_folder(path) if path.is_dir() else _read_video(path)


def write_video(path: Path, frames: NDArray[Any], fps: float) -> None:
    """Write frames [F, H, W, 3] as H.264, which every browser plays.

    H.264 loses a little: compare frames before they are written, or write a folder of images.

    Raises:
        ValueError: an odd height or width, which H.264 cannot hold.
    """
    import imageio.v2

    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"{path}: H.264 needs an even width and height, got {width} × {height}.")
    with whole_file(path) as unfinished:
        writer = imageio.v2.get_writer(
            unfinished,
            format="FFMPEG",
            fps=fps,
            codec="libx264",
            quality=9,
            macro_block_size=2,
            ffmpeg_log_level="error",
            output_params=["-movflags", "+faststart"],
        )
        # As a context manager of its own, a writer stays open after an error.
        with contextlib.closing(writer):
            for frame in as_bytes(frames):
                writer.append_data(frame)
        # A full disk stops ffmpeg without a word to us.
        num_written = sum(1 for _ in read_frames(unfinished))
        if num_written != len(frames):
            raise OSError(f"{path}: only {num_written} of {len(frames)} frames could be written. Is the disk full?")


def write_images(folder: Path, frames: NDArray[Any]) -> None:
    """Write frames [F, H, W, 3] as 00000.png, 00001.png, … into a new folder, without loss at 8 bits a channel.

    Raises:
        FileExistsError: the folder is there already.
    """
    import imageio.v3

    if folder.exists():
        raise FileExistsError(f"{folder} exists already: name another folder, or remove it.")
    unfinished = unfinished_name(folder)
    unfinished.mkdir(parents=True)
    try:
        for index, frame in enumerate(as_bytes(frames)):
            imageio.v3.imwrite(unfinished / f"{index:05d}.png", frame, plugin="pillow")
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def as_bytes(frames: NDArray[Any]) -> Image:
    """Frames as uint8, from uint8 or from floats between 0 and 1; what lies outside is cut off."""
    if frames.dtype == np.uint8:
        return frames
    return np.rint(np.clip(np.nan_to_num(frames), 0, 1) * 255).astype(np.uint8)


def _read_folder(folder: Path) -> Iterator[Image]:
    import imageio.v3

    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        expected = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"{folder} has no images in it; expected files that end in {expected}.")
    for file in sorted(files, key=_by_numbers):
        try:
            yield imageio.v3.imread(file, plugin="pillow", mode="RGB")
        except Exception as error:
            raise ValueError(f"{file} cannot be read as an image: {error}") from error


def _by_numbers(file: Path) -> list[tuple[int, str]]:
    """Key that sorts frame_2 before frame_10."""
    parts = re.split(r"(\d+)", file.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _read_video(file: Path) -> Iterator[Image]:
    import imageio.v2

    num_frames = 0
    try:
        # Each frame once, as stored: without passthrough a variable frame rate repeats and drops frames.
        reader = imageio.v2.get_reader(
            file,
            format="FFMPEG",
            output_params=["-fps_mode", "passthrough"],
        )
        with contextlib.closing(reader):
            for frame in reader:
                num_frames += 1
                yield np.asarray(frame)
    except GeneratorExit:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{file} cannot be read as a video (after {num_frames} frames): {lines[-1].strip()}"
        ) from error
    if num_frames == 0:
        raise ValueError(f"{file} holds no frames.")

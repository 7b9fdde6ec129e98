"""Reading and writing videos: video files, or folders with one image a frame. Written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from diffsparse.whole_file import unfinished_name, whole_file

Image = NDArray[np.uint8]
"""One picture [H, W, 3]."""

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif"})


def read_frames(path: Path) -> Iterator[Image]:
    """The frames [H, W, 3] of a video file, or of a folder of images in the order of the numbers in their names.

    Only one frame is held at a time.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is no video, a damaged one, or a folder without images.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.is_dir():
        return _read_folder(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(
            f"{path} is one image: put it into a folder, and name that. Of an animation put each picture there."
        )
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        expected = ", ".join(sorted(VIDEO_SUFFIXES))
        raise ValueError(f"{path} is no video by its name; expected a folder of images, or a name in {expected}.")
    return _read_video(path)


def write_video(path: Path, frames: NDArray[Any], fps: float) -> None:
    """Write frames [F, H, W, 3] as H.264, which every browser plays.

    H.264 loses a little: compare frames before they are written, or write a folder of images.

    Raises:
        ValueError: an odd height or width, which H.264 cannot hold; or there is no ffmpeg.
        OSError: it cannot be written whole.
    """
    import imageio.v2

    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"{path}: H.264 needs an even width and height, got {width} × {height}.")
    ffmpeg()
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
        try:
            # As a context manager of its own, a writer stays open after an error.
            with contextlib.closing(writer):
                for frame in as_bytes(frames):
                    writer.append_data(frame)
            # A full disk may stop ffmpeg without a word to us.
            num_written = sum(1 for _ in read_frames(unfinished))
        except (OSError, ValueError) as error:
            # Its words would be of a pipe, or of a damaged file under another name.
            raise OSError(f"{path}: {len(frames)} frames could not be written. Is the disk full?") from error
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


def ffmpeg() -> str:
    """The path of the program that reads and writes videos.

    Raises:
        ValueError: there is none. imageio-ffmpeg brings it for most systems, not for all.
    """
    import imageio_ffmpeg

    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise ValueError(
            "There is no ffmpeg here, which reads and writes videos: imageio-ffmpeg brings none for this system. "
            "Install it, or name its file in the environment as IMAGEIO_FFMPEG_EXE."
        ) from error


def images_in(folder: Path) -> list[Path]:
    """The images in a folder, in any order; no hidden files, of which macOS keeps one beside each on some disks."""
    files = (file for file in folder.iterdir() if not file.name.startswith("."))
    return [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]


def as_bytes(frames: NDArray[Any]) -> Image:
    """Frames as uint8, from uint8 or from floats between 0 and 1; what lies outside is cut off."""
    if frames.dtype == np.uint8:
        return frames
    return np.rint(np.clip(np.nan_to_num(frames), 0, 1) * 255).astype(np.uint8)


def _read_folder(folder: Path) -> Iterator[Image]:
    import PIL.Image

    files = images_in(folder)
    if not files:
        expected = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"{folder} has no images in it; expected files that end in {expected}.")
    for file in sorted(files, key=_by_numbers):
        try:
            with PIL.Image.open(file) as picture:
                # Of a JPEG, the second picture is a preview.
                if picture.format in ("GIF", "PNG", "WEBP") and getattr(picture, "is_animated", False):
                    # The first of its pictures would pass for all of them.
                    raise ValueError("it is an animation. Save each of its pictures as an image of its own")
                if picture.mode[0] in "IF":
                    # Pillow would cut off what is above 255.
                    raise ValueError("its grey has more than 8 bits. Save it with 8 bits a channel")
                frame = np.asarray(picture.convert("RGB"))
        except Exception as error:
            raise ValueError(f"{file} cannot be read as an image: {error}") from error
        yield frame


def _by_numbers(file: Path) -> list[tuple[int, str]]:
    """Key that sorts frame_2 before frame_10."""
    parts = re.split(r"(\d+)", file.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _read_video(file: Path) -> Iterator[Image]:
    """The frames as ffmpeg decodes them, while this process works on the one before.

    Not by imageio, which takes a file that breaks off for one that ends: what ffmpeg complains about is an error here.
    """
    source = ["-nostdin", "-v", "error", "-i", f"file:{file}", "-map", "0:v:0"]
    # Each frame once, as stored: without passthrough a variable frame rate repeats and drops frames.
    target = ["-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", "-"]
    num_frames = 0
    with tempfile.TemporaryFile() as complaints:
        command = [ffmpeg(), *source, *target]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints) as decoder:
            assert decoder.stdout is not None
            try:
                while (frame := _next_ppm(decoder.stdout)) is not None:
                    yield frame
                    num_frames += 1
            except BaseException:
                # Whoever reads wants no more.
                decoder.kill()
                raise
        complaints.seek(0)
        lines = complaints.read().decode(errors="replace").strip().splitlines()
    if lines or decoder.returncode != 0:
        # The first line says what was wrong; without the addresses of ffmpeg's parts.
        said = re.sub(r"\[[^\]]* @ 0x[0-9a-f]+\] *", "", lines[0]) if lines else f"exit code {decoder.returncode}"
        raise ValueError(
            f"{file} cannot be read as a video (after {num_frames} frames): ffmpeg says “{said}”. "
            "It may be cut off or damaged, or hold no video: copy it again, or make it anew."
        )
    if num_frames == 0:
        raise ValueError(f"{file} holds no frames.")


def _next_ppm(stream: IO[bytes]) -> Image | None:
    """The next picture of a stream of PPMs of 8 bits, None at its end or where it breaks off."""
    # "P6", width and height, and the largest value, each on a line.
    lines = [stream.readline() for _ in range(3)]
    if not lines[2]:
        return None
    width, height = (int(side) for side in lines[1].split())
    data = stream.read(3 * width * height)
    if len(data) < 3 * width * height:
        return None
    return np.frombuffer(data, dtype=np.uint8).reshape(height, width, 3)

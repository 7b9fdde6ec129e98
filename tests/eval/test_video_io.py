from __future__ import annotations

import os
import subprocess
from pathlib import Path

import imageio.v3
import imageio_ffmpeg
import numpy as np
import PIL.Image
import pytest

from diffsparse.eval.video_io import as_bytes, read_frames, write_images, write_video


def moving_square(frames=7, height=32, width=48):
    video = np.full((frames, height, width, 3), 60, dtype=np.uint8)
    for index in range(frames):
        video[index, 8:24, 4 * index : 4 * index + 16] = (200, 120, 40)
    return video


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_video_comes_back_with_its_size_and_length_and_nearly_its_colours(tmp_path):
    video = moving_square()
    write_video(tmp_path / "a.mp4", video, fps=8)
    back = np.stack(list(read_frames(tmp_path / "a.mp4")))
    assert back.shape == video.shape
    # H.264 keeps a quarter of the colour samples, so edges blur; flat parts keep their value within a few of 255.
    assert np.median(np.abs(back.astype(int) - video)) <= 3
    assert names_in(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("height", [16, 18, 34])
def test_heights_that_no_macro_block_divides_are_kept(tmp_path, height):
    write_video(tmp_path / "a.mp4", moving_square(height=height), fps=8)
    assert next(read_frames(tmp_path / "a.mp4")).shape == (height, 48, 3)


def test_odd_sizes_are_refused_for_video_and_kept_for_images(tmp_path):
    odd = moving_square(height=31)
    with pytest.raises(ValueError, match="48 × 31"):
        write_video(tmp_path / "a.mp4", odd, fps=8)
    write_images(tmp_path / "frames", odd)
    assert np.array_equal(np.stack(list(read_frames(tmp_path / "frames"))), odd)


def test_images_come_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 1):
        image = np.full((4, 5, 3), number, dtype=np.uint8)
        imageio.v3.imwrite(tmp_path / f"frame_{number}.png", image)
    assert [int(frame[0, 0, 0]) for frame in read_frames(tmp_path)] == [1, 2, 10]


def test_what_macos_keeps_beside_a_file_is_no_image(tmp_path):
    imageio.v3.imwrite(tmp_path / "0.png", np.full((4, 5, 3), 7, dtype=np.uint8))
    (tmp_path / "._0.png").write_bytes(b"\x00\x05\x16\x07")
    assert len(list(read_frames(tmp_path))) == 1


def test_grey_and_transparent_images_are_read_as_rgb(tmp_path):
    imageio.v3.imwrite(tmp_path / "0.png", np.full((4, 5), 7, dtype=np.uint8))
    imageio.v3.imwrite(tmp_path / "1.png", np.full((4, 5, 4), 7, dtype=np.uint8))
    assert [frame.shape for frame in read_frames(tmp_path)] == [(4, 5, 3)] * 2


def test_grey_of_more_than_8_bits_is_an_error_and_not_white(tmp_path):
    PIL.Image.fromarray(np.full((20, 30), 60 * 257, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png cannot be read.*more than 8 bits"):
        list(read_frames(tmp_path))


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_an_animation_is_an_error_and_not_its_first_picture(tmp_path, name):
    first, *others = [PIL.Image.fromarray(frame) for frame in as_bytes(moving_square(3))]
    first.save(tmp_path / name, save_all=True, append_images=others)
    with pytest.raises(ValueError, match=rf"{name} cannot be read.*it is an animation. Save each"):
        list(read_frames(tmp_path))


def test_the_preview_in_a_jpeg_makes_no_animation_of_it(tmp_path):
    picture, preview = [PIL.Image.fromarray(frame) for frame in as_bytes(moving_square(2))]
    picture.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[preview])
    assert len(list(read_frames(tmp_path))) == 1


def test_floats_are_rounded_and_cut_off():
    assert as_bytes(np.array([-1, 0, 0.5, 1, 2, np.nan])).tolist() == [0, 0, 128, 255, 255, 0]


def test_the_folder_of_images_is_never_written_over(tmp_path):
    write_images(tmp_path / "frames", moving_square(2))
    with pytest.raises(FileExistsError, match="frames"):
        write_images(tmp_path / "frames", moving_square(2))


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        read_frames(tmp_path / "none.mp4")


def test_a_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="no images"):
        list(read_frames(tmp_path))


def ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *map(str, arguments)], check=True)


def texture(frames=30):
    return np.random.default_rng(0).integers(0, 256, (frames, 64, 96, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_video_that_breaks_off_is_an_error_and_not_a_shorter_one(tmp_path, suffix):
    write_video(tmp_path / f"whole{suffix}", texture(), fps=8)
    contents = (tmp_path / f"whole{suffix}").read_bytes()
    (tmp_path / f"half{suffix}").write_bytes(contents[: len(contents) // 2])
    frames = read_frames(tmp_path / f"half{suffix}")
    with pytest.raises(ValueError, match=rf"half\{suffix} cannot be read as a video \(after 1\d frames\): ffmpeg says"):
        list(frames)


def test_damage_in_the_middle_is_an_error_though_all_frames_come(tmp_path):
    write_video(tmp_path / "a.mp4", texture(), fps=8)
    contents = bytearray((tmp_path / "a.mp4").read_bytes())
    middle = len(contents) // 2
    contents[middle : middle + 3000] = np.random.default_rng(1).bytes(3000)
    (tmp_path / "a.mp4").write_bytes(contents)
    with pytest.raises(ValueError, match=r"a\.mp4 cannot be read as a video .* copy it again, or make it anew"):
        list(read_frames(tmp_path / "a.mp4"))


def test_sound_without_a_picture_is_an_error(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.2", tmp_path / "sound.mp4")
    with pytest.raises(ValueError, match=r"sound\.mp4 cannot be read as a video \(after 0 frames\)"):
        list(read_frames(tmp_path / "sound.mp4"))


@pytest.mark.parametrize(
    ("name", "says"), [("a.png", "is one image: put it into a folder"), ("a.txt", r"a name in \.avi")]
)
def test_what_is_no_video_by_its_name_is_an_error_with_a_way_out(tmp_path, name, says):
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(ValueError, match=rf"{name} .*{says}"):
        read_frames(tmp_path / name)


def test_without_ffmpeg_videos_are_an_error_that_says_so(tmp_path, monkeypatch):
    def none():
        raise RuntimeError("No ffmpeg exe could be found.")

    write_video(tmp_path / "a.mp4", moving_square(), fps=8)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", none)
    with pytest.raises(ValueError, match="IMAGEIO_FFMPEG_EXE"):
        next(read_frames(tmp_path / "a.mp4"))
    with pytest.raises(ValueError, match="IMAGEIO_FFMPEG_EXE"):
        write_video(tmp_path / "b.mp4", moving_square(), fps=8)


@pytest.mark.parametrize("name", ["-y.mp4", "http:a.mp4", "a b %03d.mp4"])
def test_a_name_is_only_a_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(Path("plain.mp4"), moving_square(), fps=8)
    Path("plain.mp4").rename(name)
    assert sum(1 for _ in read_frames(Path(name))) == 7


def test_the_decoder_ends_with_the_reader(tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: started.append(popen(*args, **more)) or started[-1])
    write_video(tmp_path / "a.mp4", texture(60), fps=8)
    started.clear()
    frames = read_frames(tmp_path / "a.mp4")
    next(frames)
    frames.close()
    assert [decoder.poll() is not None for decoder in started] == [True]


@pytest.mark.parametrize("contents", [b"", b"this is no video", os.urandom(5000)])
def test_a_damaged_video_is_an_error_that_names_it(tmp_path, contents):
    (tmp_path / "bad.mp4").write_bytes(contents)
    with pytest.raises(ValueError, match=r"bad\.mp4"):
        list(read_frames(tmp_path / "bad.mp4"))


def test_a_damaged_image_is_an_error_that_names_it(tmp_path):
    write_images(tmp_path / "frames", moving_square(3))
    (tmp_path / "frames" / "00001.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"00001\.png"):
        list(read_frames(tmp_path / "frames"))


def test_a_variable_frame_rate_repeats_and_drops_nothing(tmp_path):
    write_video(tmp_path / "even.mp4", moving_square(), fps=8)
    # Frame n at n² eighths of a second. Matroska: into MP4, ffmpeg 7 writes one frame less.
    retimed = ["-vf", "setpts=N*N/8/TB", "-fps_mode", "passthrough", "-c:v", "libx264"]
    ffmpeg("-i", tmp_path / "even.mp4", *retimed, tmp_path / "uneven.mkv")
    assert sum(1 for _ in read_frames(tmp_path / "uneven.mkv")) == 7


@pytest.mark.parametrize("num_frames", [5, 200])
def test_a_video_that_the_disk_cannot_hold_leaves_nothing_but_an_error_that_names_it(tmp_path, num_frames):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match=rf"a\.mp4: {num_frames} frames could not be written\. Is the disk full"):
            write_video(tmp_path / "a.mp4", texture(num_frames), fps=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names_in(tmp_path) == []


def test_an_interrupted_video_leaves_nothing(tmp_path, monkeypatch):
    def frames_then_stop(frames):
        yield from frames[:3]
        raise KeyboardInterrupt

    monkeypatch.setattr("diffsparse.eval.video_io.as_bytes", frames_then_stop)
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "a.mp4", moving_square(), fps=8)
    with pytest.raises(KeyboardInterrupt):
        write_images(tmp_path / "frames", moving_square())
    assert names_in(tmp_path) == []

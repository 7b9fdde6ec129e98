"""The report in a real browser: that what it offers works, and that a prompt cannot do anything there."""

from __future__ import annotations

import os
import re
import time

import numpy as np
import pytest
from commands import run_command

from diffsparse.eval import report
from diffsparse.eval.lpips_metric import NoLpips
from diffsparse.eval.run_folder import Pair, RunFolder

HEIGHT, WIDTH, NUM_FRAMES = 64, 256, 8

HOSTILE = [
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "</script><script>window.hacked = 1</script><!--",
]


def level(frame):
    """The grey of a dense frame, of 255."""
    return 20 + 24 * frame


def dense_video():
    levels = np.array([level(frame) for frame in range(NUM_FRAMES)], dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (NUM_FRAMES, HEIGHT, WIDTH, 3)).copy()


def sparse_video(error):
    """As the dense one on the left, lighter by `error` on the right."""
    frames = dense_video()
    frames[:, :, WIDTH // 2 :] += error
    return frames


@pytest.fixture
def open_report(browser_page, fake_run, monkeypatch):
    """The page of the report of a run with some prompts."""
    monkeypatch.setattr(report, "lpips_or_reason", lambda net, backbone: NoLpips("alex", "n/a: none"))
    page = browser_page

    def show(prompts, errors):
        run = RunFolder(fake_run(prompts, list(errors)))
        for prompt in range(len(prompts)):
            for name in ("dense", *errors):
                pair = Pair(prompt, 0)
                frames = dense_video() if name == "dense" else sparse_video(errors[name][prompt])
                run.add(name, pair, frames, run.record(name, pair) | {"num_frames": NUM_FRAMES})
        run_command("eval", "report", run.path)
        page.goto((run.path / "report.html").as_uri())
        until = time.monotonic() + 20
        while not both_videos_are_there(page) and time.monotonic() < until:
            time.sleep(0.02)
        return page

    return show


def both_videos_are_there(page):
    """Each of the two is black until it has loaded."""
    row = seen(page)
    return len(row) >= 2 * WIDTH and min(row[WIDTH // 4], row[WIDTH + WIDTH // 4]) > 0


def seen(page):
    """The grey of every column of the player's canvas, halfway down."""
    return page.evaluate(
        """() => {
            const canvas = document.querySelector("canvas");
            const row = canvas.getContext("2d").getImageData(0, canvas.height / 2, canvas.width, 1).data;
            return [...row].filter((_, i) => i % 4 === 1);
        }"""
    )


def column(page, cell):
    return page.evaluate(
        "cell => [...document.querySelector('#videos').tBodies[0].rows].map(row => row.cells[cell].dataset.value)", cell
    )


def test_the_table_sorts_by_a_click_and_the_other_way_by_another(open_report):
    page = open_report(["b", "c", "a"], {"fast": [30, 10, 20], "slow": [5, 6, 7]})
    for heading, cell, as_key in (("PSNR, dB", 4, float), ("prompt", 1, str)):
        button = page.get_by_role("button", name=heading)
        button.click()
        assert column(page, cell) == sorted(column(page, cell), key=as_key)
        button.click()
        assert column(page, cell) == sorted(column(page, cell), key=as_key, reverse=True)
    page.get_by_role("button", name="look").first.click()
    page.locator("[data-role=about]", has_text="“c”").wait_for()


# Greys after compression: half of what two frames differ by.
NEAR = 11


def test_both_videos_play_in_step(open_report):
    page = open_report(["a"], {"fast": [20]})

    def frame_of_both():
        row = seen(page)
        dense, sparse = (row[place] for place in (WIDTH * 3 // 4, WIDTH + WIDTH * 3 // 4))
        (frame,) = (frame for frame in range(NUM_FRAMES) if abs(dense - level(frame)) <= NEAR)
        assert abs(sparse - level(frame) - 20) <= NEAR
        return frame

    assert frame_of_both() == 0
    for expected in (1, 2):
        page.get_by_role("button", name="frame on").click()
        page.locator("[data-role=frame]", has_text=f"frame {expected} of").wait_for()
        assert frame_of_both() == expected
    page.get_by_role("button", name="play").click()
    frames, until = set(), time.monotonic() + 20
    while len(frames) < 4 and time.monotonic() < until:
        frames.add(frame_of_both())
    assert len(frames) >= 4
    page.get_by_role("button", name="pause").click()
    page.get_by_role("button", name="play").wait_for()


def test_the_wipe_follows_the_mouse(open_report):
    page = open_report(["a"], {"fast": [40]})
    page.get_by_role("button", name="wipe").click()
    slider = page.get_by_label("wipe").bounding_box()
    dense, sparse = pytest.approx(level(0), abs=NEAR), pytest.approx(level(0) + 40, abs=NEAR)

    def drag(start, end):
        for act, share in ((page.mouse.down, start), (page.mouse.up, end)):
            page.mouse.move(slider["x"] + share * slider["width"], slider["y"] + slider["height"] / 2)
            act()
        return seen(page)

    row = drag(0.5, 0.6)
    assert (row[WIDTH * 55 // 100], row[WIDTH * 7 // 10]) == (dense, sparse)
    row = drag(0.6, 0.9)
    assert (row[WIDTH * 55 // 100], row[WIDTH * 7 // 10], row[WIDTH * 95 // 100]) == (dense, dense, sparse)


def test_the_error_map_is_dark_where_the_videos_are_equal(open_report):
    page = open_report(["a"], {"fast": [40]})
    page.get_by_role("button", name="error map").click()
    row = seen(page)
    assert len(row) == WIDTH
    assert max(row[: WIDTH // 2 - 8]) < 30
    assert min(row[WIDTH // 2 + 8 :]) > 200


def test_a_hostile_prompt_does_nothing(open_report):
    page = open_report(HOSTILE, {"fast": [10, 20, 30]})
    for button in page.get_by_role("button", name="look").all():
        button.click()
    page.get_by_role("button", name="prompt").click()
    assert page.evaluate("window.hacked") is None
    shown = page.inner_text("#videos")
    assert all(prompt in re.sub(r"\s+", " ", shown) for prompt in HOSTILE)
    # One picture, of the heads.
    assert page.locator("img").count() == 1


def test_a_folder_whose_name_is_no_utf_8_has_a_report(fake_run):
    run = fake_run(["a"], name=os.fsdecode(b"run-\xff"))
    assert run_command("eval", "report", run) == 0
    for name in ("report.html", "report.md", "report.json"):
        assert r"run-\udcff" in (run / name).read_text("utf-8")

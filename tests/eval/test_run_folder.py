from __future__ import annotations

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest

from diffsparse.eval.run_folder import Pair, RunFolder, read_manifest
from diffsparse.eval.video_io import read_frames

PAIR = Pair(2, 7)
SETTINGS = {
    "model": "m",
    "sampling": {},
    "prompts": ["a"],
    "seeds": [0],
    "configs": {"fast": {"text": "fast", "config": "F"}},
}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def noise(frames=2):
    return np.random.default_rng(0).random((frames, 6, 8, 3)).astype(np.float32)


def hold(path, held):
    with RunFolder(path).claim(PAIR, wait=True):
        held.set()
        signal.pause()


def test_a_video_comes_back_as_it_was_to_8_bits(folder):
    frames = noise()
    folder.add("fast", PAIR, frames, {"seconds": 1.5})
    back = np.stack(list(read_frames(folder.frames("fast", PAIR))))
    assert np.array_equal(back, np.rint(frames * 255).astype(np.uint8))
    assert folder.record("fast", PAIR)["seconds"] == 1.5
    assert folder.is_whole("fast", PAIR)
    assert not folder.is_whole("dense", PAIR)


@pytest.mark.parametrize("name", ["00000.png", "00001.png"])
def test_a_frame_that_was_changed_or_lost_is_noticed(folder, name):
    folder.add("fast", PAIR, noise(), {})
    file = folder.frames("fast", PAIR) / name
    contents = bytearray(file.read_bytes())
    contents[-20] ^= 1
    file.write_bytes(contents)
    assert not folder.is_whole("fast", PAIR)
    file.unlink()
    assert not folder.is_whole("fast", PAIR)


@pytest.mark.parametrize("name", [".DS_Store", "._00000.png"])
def test_what_a_file_manager_left_beside_the_frames_changes_nothing(folder, name):
    folder.add("fast", PAIR, noise(), {})
    (folder.frames("fast", PAIR) / name).write_bytes(b"view")
    assert folder.is_whole("fast", PAIR)


@pytest.mark.parametrize("contents", ["", "[]", "{}", 10_000 * "["])
def test_a_damaged_record_is_like_none(folder, contents):
    folder.add("fast", PAIR, noise(), {})
    (folder.path / "fast" / "002-seed7.json").write_text(contents)
    assert not folder.is_whole("fast", PAIR)


def test_what_a_kill_left_is_cleared_away(folder):
    unfinished = folder.path / "fast" / ".002-seed7.123.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "00000.png").touch()
    folder.frames("fast", PAIR).mkdir()
    folder.note_failure("fast", PAIR, "it was dark")
    assert folder.failure("fast", PAIR) == "it was dark"
    assert not folder.is_whole("fast", PAIR)
    folder.add("fast", PAIR, noise(), {})
    assert sorted(path.name for path in (folder.path / "fast").iterdir()) == ["002-seed7", "002-seed7.json"]
    assert folder.failure("fast", PAIR) is None


def test_a_reason_may_name_a_file_whose_name_is_no_utf_8(folder):
    folder.note_failure("fast", PAIR, "no room for run-\udcff")
    assert folder.failure("fast", PAIR) == r"no room for run-\udcff"


def test_a_pair_is_held_by_one_and_freed_by_its_death(folder):
    spawn = multiprocessing.get_context("fork")
    held = spawn.Event()
    other = spawn.Process(target=hold, args=(folder.path, held))
    other.start()
    try:
        assert held.wait(30)
        with folder.claim(PAIR, wait=False) as mine:
            assert not mine
        with folder.claim(Pair(2, 8), wait=False) as mine:
            assert mine
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    with folder.claim(PAIR, wait=True) as mine:
        assert mine


def test_seeds_and_configs_may_be_added(folder):
    folder.check(SETTINGS)
    assert not folder.path.exists()
    folder.agree(SETTINGS, {"command": "1"})
    folder.agree(SETTINGS | {"seeds": [3], "configs": {"slow": {"text": "slow", "config": "S"}}}, {"command": "2"})
    folder.agree(SETTINGS, {"command": "1"})
    manifest = read_manifest(folder.path)
    assert manifest["settings"]["seeds"] == [0, 3]
    assert set(manifest["settings"]["configs"]) == {"fast", "slow"}
    assert [made["command"] for made in manifest["made_by"]] == ["1", "2"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "n"}, 'model is "m" there, "n" now'),
        ({"prompts": ["a", "b"]}, "prompts"),
        ({"configs": {"fast": {"text": "fast", "config": "G"}}}, "config fast"),
    ],
)
def test_other_settings_are_refused_and_leave_the_folder_as_it_is(folder, change, says):
    folder.agree(SETTINGS, {})
    before = (folder.path / "manifest.json").read_text()
    for refuse in (folder.check, lambda settings: folder.agree(settings, {})):
        with pytest.raises(ValueError, match=f"other settings: .*{says}.*--output"):
            refuse(SETTINGS | change)
    assert (folder.path / "manifest.json").read_text() == before


@pytest.mark.parametrize(
    "contents", ["", "[]", 10_000 * "[", json.dumps({"settings": {}}), json.dumps({"settings": 3})]
)
def test_a_damaged_manifest_is_an_error(folder, contents):
    folder.path.mkdir()
    (folder.path / "manifest.json").write_text(contents)
    with pytest.raises(ValueError, match="damaged"):
        folder.agree(SETTINGS, {})


@pytest.mark.parametrize("name", ["configs", "prompts", "seeds", "sampling", "model"])
def test_a_manifest_edited_by_hand_is_an_error_that_says_where(folder, name):
    folder.agree(SETTINGS, {})
    file = folder.path / "manifest.json"
    whole = json.loads(file.read_text())
    # Of the first, what stands inside is wrong.
    inside = {name: {"fast": {"text": None}} if name == "configs" else [[]] if name in ("prompts", "seeds") else 3}
    for settings in (
        whole["settings"] | inside,
        whole["settings"] | {name: 3},
        {k: v for k, v in whole["settings"].items() if k != name},
    ):
        file.write_text(json.dumps(whole | {"settings": settings}))
        with pytest.raises(ValueError, match=rf"manifest\.json is damaged .*{name}"):
            read_manifest(folder.path)

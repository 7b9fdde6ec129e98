import errno
import json
import math
import os
from pathlib import Path

import pytest

from diffsparse.eval import cli
from diffsparse.eval.output_file import check_output_file, reading, write_json


def test_a_file_in_a_folder_that_exists_is_right(tmp_path, monkeypatch):
    check_output_file("--json", tmp_path / "a.json")
    (tmp_path / "a.json").touch()
    check_output_file("--json", tmp_path / "a.json")
    monkeypatch.chdir(tmp_path)
    check_output_file("--json", (tmp_path / "b.json").relative_to(tmp_path))


@pytest.mark.parametrize("name", [".", "none/a.json", "file/a.json"])
def test_a_folder_and_what_is_in_none_are_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--json must name a file in a folder that exists, got"):
        check_output_file("--json", tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"--json .* cannot be written: no permission"):
        check_output_file("--json", tmp_path / "a.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_a_whole_file_would_take_the_place_of_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(ValueError, match=f"--json must name a file, and .*{name} is a device or a pipe"):
            check_output_file("--json", tmp_path / name)


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="this system names no open files")
def test_the_end_of_a_pipe_is_refused(tmp_path):
    # As /dev/stdout is one: a link to what has no name.
    reader, writer = os.pipe()
    try:
        with pytest.raises(ValueError, match=f"--json must name a file, and /dev/fd/{writer} is a device or a pipe"):
            check_output_file("--json", Path(f"/dev/fd/{writer}"))
    finally:
        os.close(reader)
        os.close(writer)


def test_the_folder_of_an_old_file_has_to_take_a_new_one(tmp_path, monkeypatch):
    (tmp_path / "a.json").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=r"--json .* cannot be written: no permission"):
        check_output_file("--json", tmp_path / "a.json")


@pytest.mark.parametrize(
    "command",
    [
        "plan --family flux --size 1024x1024 --gpu H200 --json",
        "families --output",
        "doctor --json",
        "bench --tokens 128 --heads 1 --head-dim 8 --repeats 1 --densities 0.5 --dtypes float32 --output",
    ],
)
def test_an_old_file_outlives_a_new_one_that_cannot_be_written(tmp_path, monkeypatch, capsys, command):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "old"
    file.write_text("old")
    monkeypatch.setattr(os, "replace", full)
    assert cli.main([*command.split(), str(file)]) == cli.USER_ERROR
    assert f"No space left on device: '{file}'" in capsys.readouterr().err
    assert [each.read_text() for each in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("expression", ["{}['a']", "1 / 0", "10**400 / 3", "json.loads(10_000 * '[')"])
def test_whatever_is_wrong_with_the_contents_of_a_file_has_a_way_out(expression):
    raises = pytest.raises(ValueError, match=r"^a\.json is damaged \(\w+Error: .*\)\. Name another\.$")
    with raises, reading("a.json is damaged", "Name another."):
        eval(expression)


def test_json_is_written_whole_or_the_old_file_stays(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"×": [1, {1j}]}, str)
    assert json.loads(file.read_text(encoding="utf-8")) == {"×": [1, "{1j}"]}
    for contents in ({"a": math.nan}, {"a": 1j}):
        with pytest.raises((ValueError, TypeError), match="JSON"):
            write_json(file, contents)
    assert json.loads(file.read_text(encoding="utf-8")) == {"×": [1, "{1j}"]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_name_that_is_no_text_is_written_as_json_writes_it(tmp_path):
    name = os.fsdecode(b"\xff.mp4")
    write_json(tmp_path / "a.json", {"a": name})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": name}

from __future__ import annotations

import errno
import re

import pytest

from diffsparse.whole_file import whole_file


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write_half():
        with whole_file(path) as unfinished:
            unfinished.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_an_error_that_names_no_file_gets_the_name_of_this_one(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{path}'")), whole_file(path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "kept").mkdir()
    link = tmp_path / "a.json"
    link.symlink_to(tmp_path / "kept" / "real.json")
    for text in ("first", "second"):
        with whole_file(link) as unfinished:
            unfinished.write_text(text)
        assert link.is_symlink()
        assert (tmp_path / "kept" / "real.json").read_text() == text


@pytest.mark.parametrize("letter", ["n", "ü", "漢"])
def test_a_name_may_be_as_long_as_the_disk_allows(tmp_path, letter):
    path = tmp_path / (letter * (250 // len(letter.encode())) + ".json")
    with whole_file(path) as unfinished:
        unfinished.write_text("all")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
